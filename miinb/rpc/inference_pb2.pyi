from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "chat", "parameters_json", "request_id", "session_id")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_JSON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    chat: Chat
    parameters_json: str
    request_id: str
    session_id: str
    def __init__(self, prompt: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., parameters_json: _Optional[str] = ..., request_id: _Optional[str] = ..., session_id: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "top_ids", "top_logprobs", "text", "top_texts")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOP_TEXTS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    text: str
    top_texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ..., text: _Optional[str] = ..., top_texts: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerateChunk(_message.Message):
    __slots__ = ("text", "sequence_end", "end", "begin")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_END_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    text: TextChunk
    sequence_end: SequenceEnd
    end: RequestEnd
    begin: RequestBegin
    def __init__(self, text: _Optional[_Union[TextChunk, _Mapping]] = ..., sequence_end: _Optional[_Union[SequenceEnd, _Mapping]] = ..., end: _Optional[_Union[RequestEnd, _Mapping]] = ..., begin: _Optional[_Union[RequestBegin, _Mapping]] = ...) -> None: ...

class RequestBegin(_message.Message):
    __slots__ = ("prompt_tokens", "dropped_messages")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    dropped_messages: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., dropped_messages: _Optional[int] = ...) -> None: ...

class TextChunk(_message.Message):
    __slots__ = ("text", "token_ids", "index", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    index: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., index: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class SequenceEnd(_message.Message):
    __slots__ = ("index", "finish_reason", "output_tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    finish_reason: str
    output_tokens: int
    def __init__(self, index: _Optional[int] = ..., finish_reason: _Optional[str] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class RequestEnd(_message.Message):
    __slots__ = ("prompt_tokens", "output_tokens", "cached_tokens", "queue_s", "tokenize_s", "model_s", "detokenize_s", "seed", "draft_tokens", "accepted_tokens", "history")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_S_FIELD_NUMBER: _ClassVar[int]
    DETOKENIZE_S_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    queue_s: float
    tokenize_s: float
    model_s: float
    detokenize_s: float
    seed: int
    draft_tokens: int
    accepted_tokens: int
    history: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., tokenize_s: _Optional[float] = ..., model_s: _Optional[float] = ..., detokenize_s: _Optional[float] = ..., seed: _Optional[int] = ..., draft_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., history: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("inputs", "options", "blobs", "request_id")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedCompositeFieldContainer[_struct_pb2.Struct]
    options: _struct_pb2.Struct
    blobs: _containers.RepeatedScalarFieldContainer[bytes]
    request_id: str
    def __init__(self, inputs: _Optional[_Iterable[_Union[_struct_pb2.Struct, _Mapping]]] = ..., options: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., blobs: _Optional[_Iterable[bytes]] = ..., request_id: _Optional[str] = ...) -> None: ...

class PredictEvent(_message.Message):
    __slots__ = ("progress", "predictions")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    predictions: Predictions
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., predictions: _Optional[_Union[Predictions, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step", "total", "preview")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    step: int
    total: int
    preview: bytes
    def __init__(self, step: _Optional[int] = ..., total: _Optional[int] = ..., preview: _Optional[bytes] = ...) -> None: ...

class ImagesRequest(_message.Message):
    __slots__ = ("prompt", "parameters_json", "request_id", "image", "mask")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_JSON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    parameters_json: str
    request_id: str
    image: Source
    mask: Source
    def __init__(self, prompt: _Optional[str] = ..., parameters_json: _Optional[str] = ..., request_id: _Optional[str] = ..., image: _Optional[_Union[Source, _Mapping]] = ..., mask: _Optional[_Union[Source, _Mapping]] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImagesEvent(_message.Message):
    __slots__ = ("progress", "picture", "end")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    picture: Picture
    end: ImagesEnd
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., picture: _Optional[_Union[Picture, _Mapping]] = ..., end: _Optional[_Union[ImagesEnd, _Mapping]] = ...) -> None: ...

class Picture(_message.Message):
    __slots__ = ("index", "data", "seed", "width", "height", "flagged")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FLAGGED_FIELD_NUMBER: _ClassVar[int]
    index: int
    data: bytes
    seed: int
    width: int
    height: int
    flagged: bool
    def __init__(self, index: _Optional[int] = ..., data: _Optional[bytes] = ..., seed: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., flagged: bool = ...) -> None: ...

class ImagesEnd(_message.Message):
    __slots__ = ("prompt_tokens", "cut", "negative_cut", "batch", "queue_s", "text_encode_s", "steps_s", "vae_s", "picture_s")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_CUT_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TEXT_ENCODE_S_FIELD_NUMBER: _ClassVar[int]
    STEPS_S_FIELD_NUMBER: _ClassVar[int]
    VAE_S_FIELD_NUMBER: _ClassVar[int]
    PICTURE_S_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cut: str
    negative_cut: str
    batch: int
    queue_s: float
    text_encode_s: float
    steps_s: float
    vae_s: float
    picture_s: float
    def __init__(self, prompt_tokens: _Optional[int] = ..., cut: _Optional[str] = ..., negative_cut: _Optional[str] = ..., batch: _Optional[int] = ..., queue_s: _Optional[float] = ..., text_encode_s: _Optional[float] = ..., steps_s: _Optional[float] = ..., vae_s: _Optional[float] = ..., picture_s: _Optional[float] = ...) -> None: ...

class Predictions(_message.Message):
    __slots__ = ("outputs_json", "blobs", "queue_s", "preprocess_s", "model_s", "postprocess_s", "columns")
    OUTPUTS_JSON_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_S_FIELD_NUMBER: _ClassVar[int]
    POSTPROCESS_S_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    outputs_json: str
    blobs: _containers.RepeatedScalarFieldContainer[bytes]
    queue_s: float
    preprocess_s: float
    model_s: float
    postprocess_s: float
    columns: int
    def __init__(self, outputs_json: _Optional[str] = ..., blobs: _Optional[_Iterable[bytes]] = ..., queue_s: _Optional[float] = ..., preprocess_s: _Optional[float] = ..., model_s: _Optional[float] = ..., postprocess_s: _Optional[float] = ..., columns: _Optional[int] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class SessionReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...
