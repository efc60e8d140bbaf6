"""Limits of the control protocol: sizes, counts, and the bounded types that messages are made of."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

EPOCH_BYTES = 16
BATCH_ID_BYTES = 16
RUN_BYTES = 16
MAX_MESSAGE_BYTES = 8 << 20
"""Largest control frame either side accepts, payloads apart; a peer that sends more is disconnected by libzmq."""
MAX_REQUEST_BYTES = 128 << 10
"""Largest frame of a trainer's, apart from the tokens, lengths and payloads of a SUBMIT."""
MAX_PAYLOAD_BYTES = 256 << 20
"""Most bytes of the payloads of a batch; a daemon takes as many as it is set to."""
MAX_ARRAYS = 16
"""Of one payload."""
ARTIFACT_CHUNK_BYTES = 256 << 10
MAX_FETCHES = 16
"""Artifact reads of one session that may be in flight at once."""
MAX_REASON_CHARS = 2000
MAX_NAME_CHARS = 200
MAX_HELLO_BYTES = 4096
MAX_OFFER_BYTES = 64 << 10
MAX_TAPS = 1024
MAX_TENSORS = 16
MAX_DIMENSIONS = 8
"""Of one tensor; a Layout has up to MAX_TENSORS."""
MAX_TRANSPORTS = 32
MAX_INT31 = (1 << 31) - 1
"""Largest credit count, process id, slot index and number of milliseconds."""

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
Names = Annotated[tuple[Name, ...], Meta(max_length=MAX_TRANSPORTS)]
Share = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARS)]
BatchId = Annotated[bytes, Meta(min_length=BATCH_ID_BYTES, max_length=BATCH_ID_BYTES)]
Int31 = Annotated[int, Meta(ge=0, le=MAX_INT31)]
U64 = Annotated[int, Meta(ge=0)]  # msgpack has no larger integer
Positive = Annotated[int, Meta(ge=1, le=MAX_INT31)]
PositiveFloat = Annotated[float, Meta(gt=0)]
Payload = Annotated[bytes, Meta(max_length=MAX_PAYLOAD_BYTES)]
Payloads = Annotated[tuple[Payload, ...], Meta(max_length=MAX_MESSAGE_BYTES // 4)]
Int32s = Annotated[bytes, Meta(min_length=4, max_length=MAX_MESSAGE_BYTES)]
