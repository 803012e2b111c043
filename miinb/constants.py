"""MII's enumerations, under MII's path: `miinb.constants.DeploymentType`, `miinb.constants.TaskType`."""

from __future__ import annotations

from enum import StrEnum


class DeploymentType(StrEnum):
    """Where `miinb.deploy` puts a model."""

    LOCAL = "local"  #: this machine; lives on when the caller ends
    AML = "aml"  #: Azure ML
    NON_PERSISTENT = "non-persistent"  #: this machine; ends with the caller


class TaskType(StrEnum):
    """MII's tasks, by Hugging Face's names."""

    TEXT_GENERATION = "text-generation"
    TEXT_CLASSIFICATION = "text-classification"
    QUESTION_ANSWERING = "question-answering"
    FILL_MASK = "fill-mask"
    TOKEN_CLASSIFICATION = "token-classification"
    CONVERSATIONAL = "conversational"
    TEXT2IMG = "text-to-image"
