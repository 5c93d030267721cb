"""The experts of tokens that a table of token ids gives, with their combine weights, in one pass.

DeepSeek-V4's first layers choose so ("hash layers"): the choice does not depend on scores, the
weights do.

Legend: T tokens, E experts, K top-k, V token ids.
"""

import torch

from engine.ops import triton_support
from engine.ops.select_experts import SelectionRule, select_experts, weigh_scores


def table_experts(
    logits_TE: torch.Tensor, table_VK: torch.Tensor, token_ids_T: torch.Tensor, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score gate logits [T, E] in float32 and look up each token's experts; no host sync.

    Args:
        logits_TE: gate logits.
        table_VK: int64, experts that exist, different ones in a row.
        token_ids_T: int64, rows of the table.
        rule: its score, normalisation and scale are used; it has no groups.

    Returns:
        scores_TE (float32, the same bits as those of `select_experts`), topk_ids_TK (int64, in the
        table's order) and topk_weights_TK (float32, see `weigh_scores`).
    """
    if triton_support.serves(logits_TE):
        from engine.ops.gpu.table_experts import table_experts_triton

        return table_experts_triton(logits_TE, table_VK, token_ids_T, rule)
    return table_experts_reference(logits_TE, table_VK, token_ids_T, rule)


def table_experts_reference(
    logits_TE: torch.Tensor, table_VK: torch.Tensor, token_ids_T: torch.Tensor, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Form of `table_experts` in torch; the scores are those of the op that serves."""
    scores_TE = select_experts(logits_TE, None, SelectionRule(1, rule.score))[0]
    ids_TK = table_VK.index_select(0, token_ids_T)
    chosen_TK = scores_TE.gather(1, ids_TK)
    return scores_TE, ids_TK, weigh_scores(chosen_TK, chosen_TK, rule)
