"""The data of one request: `Request` (prompt tokens, `SamplingParams`) in, `Completion` out.

Plain data: nothing here uses a tensor or a tokenizer.
"""

from engine.request.completion import (
    CapacityUse,
    Completion,
    FinishReason,
    Timing,
    TopLogprobs,
    usage_of,
)
from engine.request.errors import ErrorCode, RequestError, error_record, show
from engine.request.params import SamplingParams, check_logit_bias
from engine.request.request import MAX_CHOICES, Endpoint, Request
from engine.request.token_ids import check_token_ids, whole_number
