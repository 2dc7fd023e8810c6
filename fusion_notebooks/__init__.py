"""Where and how multimodal LLMs fuse vision and language"""
__version__ = "0.1.0"
