"""Expert form: what one family's routed experts compute between their two matrices.

| activation | gated                                        | without a gate       | families      |
|------------|----------------------------------------------|----------------------|---------------|
| silu       | silu(gate) * up                              | silu(up)             | most          |
| gelu       | gelu(gate) * up, by erf                      | gelu(up)             |               |
| gelu_tanh  | the same, by tanh                            | the same, by tanh    |               |
| relu2      | relu(gate) ** 2 * up                         | relu(up) ** 2        | Nemotron-H    |
| gpt_oss    | (up + 1) * gate * sigmoid(alpha * gate)      | there is none        | gpt-oss       |

`limit` bounds both before that: gate at most limit, up between -limit and limit. Biases are added
to an expert's rows where the expert is, before the combine weight, so a dropped assignment takes
its weighted bias along. `expert_rows.py` says what `latent` means.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.ops.expert_activation import Activation, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """How a family's routed experts differ from silu(x w1^T) * (x w3^T) w2^T."""

    activation: Activation = "silu"
    gated: bool = True  # without a gate, w13 is w1 alone: [e, F, D]
    bias: bool = False  # on both projections
    limit: float | None = None  # bound of gate and up before the activation; None: none
    alpha: float = 1.702  # of gpt_oss (swiglu_alpha)
    latent: int | None = None  # width of the rows that experts take and return; None: the model's

    def __post_init__(self) -> None:
        """Check the fields against each other.

        Raises:
            ValueError: naming the field, its value and the rule.
        """
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"swiglu_limit: {self.limit} in config.json must be above 0")
        if self.activation == "gpt_oss" and not self.gated:
            raise ValueError("the activation gpt_oss needs a gate")

    @property
    def is_plain(self) -> bool:
        """Whether this is SwiGLU without bias or bound, which the compiled kernels compute."""
        return self.activation == "silu" and self.gated and not self.bias and self.limit is None

    @property
    def parts(self) -> int:
        """Matrices in w13: gate and up, or one."""
        return 2 if self.gated else 1

    @property
    def rule(self) -> Rule:
        """The rule by which the activation is computed."""
        return Rule(self.activation, self.gated, self.limit, self.alpha)

    @property
    def words(self) -> str:
        """What differs from plain SwiGLU, for messages."""
        found = [] if self.activation == "silu" else [f"the activation {self.activation}"]
        found += [] if self.gated else ["no gate"]
        found += ["biases"] if self.bias else []
        found += [] if self.limit is None else [f"a limit of {self.limit:g}"]
        return ", ".join(found) or "plain SwiGLU"
