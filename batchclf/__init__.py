"""Label a news archive with a fine-tuned GPT-2 classifier: files in, labelled Parquet out."""

__version__ = "0.1.0"
