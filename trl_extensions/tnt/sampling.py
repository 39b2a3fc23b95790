"""Sample the original model's own outputs: what targeted negative training learns from (arXiv 2406.13660).

The sampling itself belongs to no method; these are its names for this one.
"""

from ..core.sampling import COLUMNS, SamplingReport, as_prompt, load_outputs, sample_outputs


__all__ = ["COLUMNS", "SamplingReport", "as_prompt", "load_outputs", "sample_outputs"]
