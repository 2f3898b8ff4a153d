"""CRA + DSI: attention from the keys of a middle layer, values from the last three layers.

Liu et al., "Unveiling the Knowledge of CLIP for Training-Free Open-Vocabulary Semantic Segmentation", AAAI 2025. The
paper calls the whole CLIPSeg, which in transformers is another model; here it goes by its two parts:

* CRA, coherence enhanced residual attention (Eq. 3): Attn = (k_M k_M^T + G(k_M)) tau, with k_M the keys of the layer
  whose patches are most coherent and G a relation of patches that hang together through others.
* DSI, deep semantic integration (Eq. 4): x~_i = x_{i-1} + FFN_i(x_{i-1}), v~_i = W_v x~_i with W_v of the last layer,
  combined with the last value v_L into V.

The result is Z = Proj(softmax(Attn) V) (Eq. 2): no residual, no feed-forward layer; then CLIP's post-norm and
projection.

There is no code of the authors to follow, and the text leaves points open. How they are read here, why, and the setting
that changes it (in brackets):

* Layer of k_M [`layer`]: 9/24 of the depth, rounded up. The text says 8 to 9 for the 24 layers of ViT-L, and Fig. 3
  shows 9 as accurate; other depths are in a figure only. `arm-hf coherence` measures the layer for any CLIP.
* Scale of k_M [`normalize_keys`]: unit length, as where the metric M is defined. With raw keys tau = 6 would make every
  row of the softmax one-hot, and Table 6 (tau of 5 to 8) could not show a gradual change.
* Heads: joined into one key, so one map serves all values, as the paper does "for simplicity" where it defines M.
* Meaning of eps = 0.75 [`eps_is`]: a similarity to exceed, as the text of Eq. 3 has it. The implementation details
  call it a distance; but as a distance (similarity above 0.25) most patches of an image would likely be one cluster,
  G a constant that the softmax does not see, and Table 4 could hardly show a gain.
* G [`relation`]: pairs that DBSCAN connects get eps, all others 0, as the implementation details say ("soft-dbscan").
  A border patch belongs to every cluster it touches, so that the order of patches does not matter. "common" is the text
  of Eq. 3 instead: pairs with a common third patch.
* Core patches [`min_samples`]: 3 similar ones with the patch itself, the highest number with which DBSCAN connects
  every pair that has a common third patch, so that the practice keeps what Eq. 3 asks for.
* Norms in Eq. 4 [`ffn_norm`, `value_norm`]: as in the blocks, whose weights expect normalised input; Eq. 1 does write
  FFN(LN(x)).
* x~_i starts from x_{i-1} of the unchanged forward pass, as written, not from x~_{i-1}.
* "Last three layers" [`depth`]: v_L, v~_{L-1} and v~_{L-2}; in Table 5 l = -1 is v_L alone, in Fig. 6 v~_{L-1} is -2.
* "Ensemble" [`combine`]: the mean. Without the residual, a sum differs only in the weight of the output bias.
* CLS [`use_cls`]: left out; k_M and Z are P x D with P patches.
* Temperature over words [`logit_scale`]: CLIP's own. Windows, size and PAMR belong to the evaluation.

With `relation="none"` and `layer` the last one, attention is k_L-k_L of Table 4; with `depth=1`, V is v_L.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend, merge_heads, project_heads
from .block import feed_forward
from .method import MethodContext, MethodSettings, register_method, setting
from .trunk import TrunkRequest

CRA_DSI_METHODS = ("cra_dsi",)

RELATIONS = ("reachable", "common", "none")
EPS_MEANINGS = ("similarity", "distance")
COMBINATIONS = ("mean", "sum")


@dataclass(frozen=True)
class CraDsiSettings(MethodSettings):
    """Settings of CRA and DSI; the defaults are the paper's, the open ones as the module's docstring reads them."""

    layer: int | None = setting(
        None, "layer of k_M, counted from 1; None is 9/24 of the depth (5 of 12, 9 of 24); `arm-hf coherence` finds it"
    )
    temperature: float = setting(6.0, "tau, factor on the sum of cosines and relation; 6 in the paper, 5 to 8 tried")
    eps: float = setting(
        0.75, "bound on the similarity of related patches, and what their relation adds to it; 0.75 in the paper"
    )
    eps_is: str = setting(
        "similarity", 'whether eps bounds the cosine "similarity" from below or the cosine "distance" from above'
    )
    relation: str = setting(
        "reachable",
        'G: "reachable" relates patches of one DBSCAN cluster, "common" those with a common third patch, "none" no one',
    )
    min_samples: int = setting(
        3, "similar patches, with itself, that make a patch a core patch of DBSCAN; the paper names no number"
    )
    normalize_keys: bool = setting(True, "use keys of unit length in the attention; False takes them as they are")
    depth: int = setting(3, "last layers combined into the values; 1 is the last value alone; 3 in the paper")
    combine: str = setting("mean", 'how they are combined, "mean" or "sum"')
    ffn_norm: bool = setting(True, "normalise before the feed-forward layers; False is Eq. 4 to the letter")
    value_norm: bool = setting(True, "normalise before the value projection; False is Eq. 4 to the letter")
    use_cls: bool = setting(False, "let the CLS token take part in attention, relation and values")

    def __post_init__(self) -> None:
        for name, allowed in (("eps_is", EPS_MEANINGS), ("relation", RELATIONS), ("combine", COMBINATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.eps <= (1 if self.eps_is == "similarity" else 2):
            raise ValueError(f"eps must be above 0 and at most 1 (2 for a distance), got {self.eps}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        for name in ("min_samples", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def key_block(self, num_blocks: int) -> int:
        """0-based block that k_M comes from.

        Raises:
            ValueError: The tower has no such layer.
        """
        layer = default_key_layer(num_blocks) if self.layer is None else self.layer
        if not 1 <= layer <= num_blocks:
            raise ValueError(f"layer must be 1 to {num_blocks} for this CLIP, got {layer}")
        return layer - 1

    def regenerated_blocks(self, num_blocks: int) -> range:
        """0-based blocks that give a v~, without those that a shallow tower does not have."""
        return range(max(0, num_blocks - self.depth), num_blocks - 1)


def default_key_layer(num_blocks: int) -> int:
    """Layer of k_M (from 1) where nobody measured it: 9/24 of the depth, rounded up."""
    return math.ceil(9 * num_blocks / 24)


def components(adjacent: Tensor) -> Tensor:
    """Connected components of undirected graphs.

    Labels run along the edges; each round hooks whole trees of equal labels to the lowest neighbour and halves the
    paths to the root, so that long chains take few rounds.

    Args:
        adjacent: Symmetric, (B, N, N) bool.

    Returns:
        The lowest index of each node's component, (B, N) int64.
    """
    batch, size = adjacent.shape[:2]
    labels = torch.arange(size, device=adjacent.device).expand(batch, size)
    while True:
        lowest = torch.where(adjacent, labels[:, None].int(), size).amin(dim=-1).long()  # (B, N), size: no neighbour
        hooked = labels.scatter_reduce(1, labels, torch.minimum(labels, lowest), "amin")
        hooked = hooked.gather(1, hooked).gather(1, hooked)
        if torch.equal(hooked, labels):
            return labels
        labels = hooked


@torch.no_grad()
def density_connected(similar: Tensor, min_samples: int) -> Tensor:
    """Pairs that DBSCAN would put into one cluster.

    A patch with `min_samples` similar ones (itself counted) is a core patch; core patches in touch form a cluster,
    which all patches similar to one of them belong to (Ester et al., KDD 1996, definition 4, "density-connected"). A
    border patch in touch with several clusters belongs to each of them; patches of no cluster are related to nobody.

    Args:
        similar: Symmetric with a true diagonal, (B, N, N) bool.
        min_samples: As in scikit-learn's DBSCAN.

    Returns:
        (B, N, N) bool, symmetric.
    """
    core = similar.sum(dim=-1) >= min_samples  # (B, N)
    touches = similar & core[:, None]  # (B, N, N), [i, j]: i is in touch with the core patch j
    labels = components(touches & core[..., None])
    roots = core & (labels == torch.arange(labels.shape[1], device=labels.device))
    count = int(roots.sum(dim=-1).max())  # clusters in the image that has most
    cluster = (roots.cumsum(dim=-1) - 1).gather(1, labels)  # of core patches; what the others have is masked
    of_core = (cluster[..., None] == torch.arange(count, device=labels.device)) & core[..., None]  # (B, N, C)
    member = (touches.float() @ of_core.float() > 0).float()  # (B, N, C)
    return member @ member.transpose(-2, -1) > 0


@torch.no_grad()
def relation(similar: Tensor, settings: CraDsiSettings) -> Tensor:
    """Pairs of patches that G relates, (B, N, N) bool, from pairs similar enough.

    Args:
        similar: Which pairs are similar enough, (B, N, N) bool.
        settings: Its `relation` and `min_samples`.
    """
    if settings.relation == "reachable":
        return density_connected(similar, settings.min_samples)
    others = (similar & ~torch.eye(similar.shape[-1], dtype=torch.bool, device=similar.device)).float()
    return others @ others > 0


def cra_attention(keys: Tensor, values: Tensor, settings: CraDsiSettings) -> Tensor:
    """Softmax((k k^T + G(k)) tau) v (Eqs. 2, 3).

    Args:
        keys: k_M with joined heads, (B, N, W).
        values: V with joined heads, (B, N, W).
        settings: Temperature, eps and readings.

    Returns:
        (B, N, W).
    """
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    units = F.normalize(keys, dim=-1)
    used = units if settings.normalize_keys else keys
    if settings.relation == "none":
        used = used.to(values.dtype)[:, None]
        return attend(used, used, values[:, None], settings.temperature)[:, 0]
    cosines = units @ units.transpose(-2, -1)  # (B, N, N)
    bound = settings.eps if settings.eps_is == "similarity" else 1 - settings.eps
    similar = cosines >= bound
    similar = similar & similar.transpose(-2, -1)  # rounding may differ on both sides of the diagonal
    similar.diagonal(dim1=-2, dim2=-1).fill_(True)
    scores = cosines if settings.normalize_keys else used @ used.transpose(-2, -1)
    scores = (scores + settings.eps * relation(similar, settings).to(scores.dtype)) * settings.temperature
    return scores.softmax(dim=-1).to(values.dtype) @ values


def regenerate(block: Any, state: Tensor, norm: bool = True) -> Tensor:
    """x~ = x + FFN(x): a block's output without its attention (Eq. 4), (B, L, W) -> (B, L, W).

    Args:
        block: A CLIP encoder layer.
        state: Its input, (B, L, W).
        norm: Normalise before the feed-forward layer.
    """
    return feed_forward(block, state) if norm else state + block.mlp(state)


def integrated_values(context: MethodContext, settings: CraDsiSettings, first: int) -> Tensor:
    """V: the last value combined with those of the layers before, heads joined.

    The value projection is linear, so it runs once, on the mean of its inputs.

    Args:
        context: Supplies blocks and hidden states.
        settings: Depth, combination and norms.
        first: 1 leaves the CLS token out, 0 keeps it.

    Returns:
        (B, N, W).
    """
    tower, states = context.tower, context.trunk.hidden_states
    last = tower.last_block
    inputs = [last.layer_norm1(context.trunk.last_input[:, first:])]
    for index in settings.regenerated_blocks(tower.num_blocks):
        state = regenerate(tower.blocks[index], states[index][:, first:], settings.ffn_norm)
        inputs.append(last.layer_norm1(state) if settings.value_norm else state)
    values = last.self_attn.v_proj(torch.stack(inputs).mean(dim=0) if len(inputs) > 1 else inputs[0])
    return values * len(inputs) if settings.combine == "sum" else values


def _request(settings: CraDsiSettings, num_blocks: int) -> TrunkRequest:
    key_block = settings.key_block(num_blocks)
    return TrunkRequest(
        hidden_states=tuple(settings.regenerated_blocks(num_blocks)),
        heads=() if key_block == num_blocks - 1 else (key_block,),
        position_rule=settings.position_rule,
    )


@register_method(
    "cra_dsi",
    settings=CraDsiSettings,
    paper="Liu et al., Unveiling the Knowledge of CLIP for Training-Free Open-Vocabulary Semantic Segmentation "
    "(CLIPSeg), AAAI 2025",
    reference="no code is public; written from the paper, its open points read as the docstring of cra_dsi.py says",
    summary="key-key attention of a middle layer with DBSCAN relations, values of the last three layers combined",
    cost="about 1.05 of a plain image pass: two more feed-forward layers",
    request=_request,
)
def cra_dsi(context: MethodContext, settings: CraDsiSettings) -> Tensor:
    """CRA's one map for all heads applied to DSI's values, output projection only."""
    tower, trunk = context.tower, context.trunk
    key_block, first = settings.key_block(tower.num_blocks), 0 if settings.use_cls else 1
    if key_block in trunk.heads:
        keys = trunk.heads[key_block][1]
    else:
        (keys,) = project_heads(tower.last_block, trunk.last_input, "k")
    attended = cra_attention(
        merge_heads(keys)[:, first:], integrated_values(context, settings, first), settings
    )  # (B, N, W)
    tokens = tower.last_block.self_attn.out_proj(attended)
    return tower.project(tokens[:, 1 - first :])
