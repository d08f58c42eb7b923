"""genrec: fine-tune language models into generative recommenders with semantic ids."""

__version__ = "0.1.0"
