"""Visual question answering: rendered scenes with known answers, and LLaVA's conversation JSON.

Enters: a seed, or a JSON file and its pictures. Leaves: conversations, and batches of them.

    scenes              what a picture contains, drawn from a seed, split by content
    render              a scene as pixels
    questions           questions of six families with their answers, derived from the scene
    conversations       the record a model is trained on, and datasets of them
    conversation_table  LLaVA's JSON as an Arrow file that processes share
    packing             conversations as token tensors, several questions behind one image
    visits              in which order a run meets its records, epoch after epoch
    packaged            weights and texts that packages bring along
"""

from planner.training.data.conversations import (
    Conversation,
    LlavaConversations,
    SceneConversations,
    SceneQuestions,
    write_llava,
)
from planner.training.data.packing import Packer
from planner.training.data.questions import FAMILIES, Turn, families_of
from planner.training.data.scenes import SPLITS, Scene

__all__ = [
    "FAMILIES",
    "SPLITS",
    "Conversation",
    "LlavaConversations",
    "Packer",
    "Scene",
    "SceneConversations",
    "SceneQuestions",
    "Turn",
    "families_of",
    "write_llava",
]
