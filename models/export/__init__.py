"""Export: a plan's smaller model as a checkpoint of its own, weights sliced.

In: the base model with its weights, its Graph, a Plan. Out: a folder, in one of two forms.

    uniform_export  plain: a stock config with the smaller sizes, so stock transformers, and any
                    serving engine that reads its checkpoints, loads the folder. It exists if a
                    config can say what is kept: layers dropped, the same widths in every layer
    planned_export  planned: the base model's config, narrowed weights under a name that stock
                    loaders do not read, and `load`, for everything else
    weights         the weights of what a plan keeps, for both
    write           the folder: written whole or not at all, read back and compared with the
                    planned model before it appears
"""

from planner.models.export.planned_export import load
from planner.models.export.write import Exported, export

__all__ = ["Exported", "export", "load"]
