"""Conversion: a checkpoint in its authors' own layout becomes one that stock transformers loads.

In: a folder in the layout of LLaVA-1.5 (arXiv 2310.03744), AdaLLaVA (arXiv 2503.10905) or
Dynamic-LLaVA (arXiv 2412.00876). Out: a stock LLaVA with its processor, and beside it planner's
files of what else the checkpoint holds.

    tensor_files      the tensors in a folder's files
    authors_config    the authors' config, and the stock one that says the same
    authors_weights   what the authors call each weight; nothing missing, nothing left over
    stock_processor   tokenizer, image processor and prompt as the authors have them
    authors_checkpoint  the whole way, from folder to folder
"""

from planner.models.conversion.authors_checkpoint import Converted, convert
from planner.models.conversion.stock_processor import as_llava_v1

__all__ = ["Converted", "as_llava_v1", "convert"]
