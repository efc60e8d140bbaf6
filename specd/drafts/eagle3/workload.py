"""What an EAGLE-3 training step costs: useful operations by part, for the benchmark."""

from __future__ import annotations

import numpy as np

from specd.drafts.base import Workload
from specd.drafts.eagle3.objective import Eagle3
from specd.drafts.eagle3.rows import rows_of
from specd.protocol.batch import Batch


def workload(objective: Eagle3, batch: Batch) -> Workload:
    """What a step of `batch` costs, forward and backward. Products whose result nobody needs are not counted.

    A multiplication and an addition are two. Of the first step all rows are keys; of the target's lm_head there is no
    gradient.
    """
    shape = objective.draft.shape
    rows = rows_of(batch, shape.num_steps)
    hidden, kv = shape.hidden_size, shape.num_kv_heads * shape.head_dim
    heads = shape.num_heads * shape.head_dim
    queries = sum(part.size for part in rows.queries)
    predictions = sum(part.size for part in rows.counting)
    keyed = batch.num_tokens + sum(part.size for part in rows.queries[1:])
    seen = sum(int((part - rows.starts[part] + 1 + step).sum()) for step, part in enumerate(rows.queries))
    product = 3 * 2.0
    flops = {
        "fc": 2 * 2.0 * batch.num_tokens * len(shape.taps) * hidden * hidden,
        "keys and values": product * keyed * 2 * hidden * 2 * kv,
        "queries and output": product * queries * (2 * hidden + hidden) * heads,
        "attention": product * 2 * float(np.int64(seen)) * heads,
        "mlp": product * queries * 3 * hidden * shape.intermediate_size,
        "head": product * predictions * hidden * shape.draft_vocab_size,
        "teacher": 2.0 * rows.teachers.size * hidden * shape.vocab_size,
    }
    return Workload(rows=queries, predictions=predictions, flops=flops, parts={})
