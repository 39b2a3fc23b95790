"""How fast the trainers are on a GPU, and whether they compute there what they compute on a CPU."""
