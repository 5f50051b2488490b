"""NextFlow: one decoder-only transformer that reads and writes interleaved text and images (arXiv 2601.02204)."""

__version__ = "0.1.0"
