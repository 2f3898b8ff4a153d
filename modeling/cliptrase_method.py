"""CLIPtrase: summed self-correlation attention in the last block, and its clustering of patches into regions.

Shao et al., "Explore the Potential of CLIP for Training-Free Open Vocabulary Semantic Segmentation", ECCV 2024; code
2b7de61. The last block attends with softmax(s q q^T) + softmax(s k k^T) + softmax(s v v^T), a sum whose rows add up to
3, and keeps residual and feed-forward layer. The clustering reads the block before: the mean over q, k, v and heads of
the cosines between tokens. It needs scikit-learn and is off by default.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend, merge_heads, project_heads
from .block import add_projection, feed_forward
from .method import Method, MethodContext, MethodSettings, ScoreMap, register_method, setting
from .trunk import TrunkRequest

CLIPTRASE_METHODS = ("cliptrase",)

CLUSTERINGS = ("none", "vote", "mean")
UPSAMPLING = 4  # of a cluster's map before the median filter
MEDIAN_SIDE = 7
SMALL_GRID = 256  # patches; the code has one pair of DBSCAN settings for 196 and one for 441


@dataclass(frozen=True)
class CliptraseSettings(MethodSettings):
    """CLIPtrase as its own evaluation runs it, without the clustering unless asked for."""

    image_weighting: bool = setting(
        False, "multiply the logits of the patches by those of the whole image; only for VOC20 in the code"
    )
    clustering: str = setting(
        "none",
        'regions from DBSCAN: "vote" gives a region its most frequent label, "mean" its mean cosines (as the '
        'detectron2 variant of the code), "none" leaves patches alone; the first two need scikit-learn',
    )
    eps: float | None = setting(
        None, "DBSCAN's radius; None is 0.7 up to 256 patches, else 1.1, as the code has for 224 and 336 pixels"
    )
    min_samples: int | None = setting(
        None, "DBSCAN's neighbours of a core patch; None is 3 up to 256 patches, else 7, as in the code"
    )

    def __post_init__(self) -> None:
        if self.clustering not in CLUSTERINGS:
            raise ValueError(f"clustering must be one of {', '.join(CLUSTERINGS)}, got {self.clustering!r}")
        if self.eps is not None and self.eps <= 0:
            raise ValueError(f"eps must be positive or None, got {self.eps}")
        if self.min_samples is not None and self.min_samples < 1:
            raise ValueError(f"min_samples must be at least 1 or None, got {self.min_samples}")


def correlation(heads: tuple[Tensor, ...]) -> Tensor:
    """Mean over q, k, v and heads of the cosines between tokens, (B, L, L).

    The sum over heads is inside the product: the unit vectors of all heads stand side by side.

    Args:
        heads: q, k, v of a block, each (B, heads, L, d).
    """
    units = torch.cat([merge_heads(F.normalize(states.float(), dim=-1)) for states in heads], dim=-1)  # (B, L, 3W)
    return units @ units.transpose(-2, -1) / (len(heads) * heads[0].shape[1])


def denoise(weights: Tensor) -> Tensor:
    """Patch correlations above those of the CLS token, max(M - M_cls, 0): (B, L, L) -> (B, N, N)."""
    return (weights[:, 1:, 1:] - weights[:, :1, 1:]).clamp_min(0)


def dbscan(rows: Tensor, eps: float, min_samples: int) -> Tensor:
    """Cluster of each row of (N, N), -1 for noise; euclidean distance.

    Args:
        rows: One point each, (N, N).
        eps: Radius of a neighbourhood.
        min_samples: Points in that of a core point, itself included.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.cluster import DBSCAN
    except ImportError as error:
        raise ImportError(
            'the clustering of CLIPtrase needs scikit-learn: run "pip install scikit-learn", or use clustering="none"'
        ) from error
    labels = DBSCAN(eps=eps, min_samples=min_samples).fit_predict(rows.detach().float().cpu().numpy())
    return torch.from_numpy(labels).to(rows.device)


def median_filter(maps: Tensor) -> Tensor:
    """Median over squares of 7 x 7 cells of a map (H, W) that continues mirrored, border cells twice."""
    border = MEDIAN_SIDE // 2
    for dim, length in enumerate(maps.shape):
        places = torch.arange(-border, length + border, device=maps.device)
        places = torch.where(places < 0, -1 - places, places)
        maps = maps.index_select(dim, torch.where(places >= length, 2 * length - 1 - places, places))
    return maps.unfold(0, MEDIAN_SIDE, 1).unfold(1, MEDIAN_SIDE, 1).flatten(2).median(dim=-1).values


def region_map(rows: Tensor, clusters: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cluster of every pixel, (H, W); noise patches join the cluster whose mean map is highest there.

    Args:
        rows: Correlations, (N, N).
        clusters: Cluster of each patch, (N,), -1 for noise; at least one cluster.
        grid: Patches per column and row.
        size: Height and width in pixels.
    """
    best = rows.new_full(size, -torch.inf)
    regions = torch.zeros(size, dtype=torch.long, device=rows.device)
    for index in range(int(clusters.max()) + 1):  # one by one: a map of all clusters may not fit
        mean = rows[clusters == index].mean(dim=0).view(1, 1, *grid)
        mean = F.interpolate(mean, scale_factor=UPSAMPLING, mode="bilinear", align_corners=False)
        mean = median_filter(mean[0, 0])
        mean = F.interpolate(mean[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        regions = torch.where(mean > best, index, regions)
        best = torch.maximum(mean, best)
    return regions


def region_scores(
    context: MethodContext, settings: CliptraseSettings, values: Tensor, rows: Tensor, scale: float
) -> Tensor:
    """Scores of one image after clustering.

    Args:
        context: Supplies grid, size and padding, and the queries of the background.
        settings: With a clustering other than "none".
        values: Scores of the patches, (Q, h, w).
        rows: Denoised correlations of the patches, (N, N).
        scale: Factor on the scores in the softmax that stands in where there is no cluster.

    Returns:
        (Q, H, W) at the padded image's size: shares of a region's pixels ("vote") or mean scores ("mean").
    """
    trunk, vote = context.trunk, settings.clustering == "vote"
    small = len(rows) <= SMALL_GRID
    eps = (0.7 if small else 1.1) if settings.eps is None else settings.eps
    min_samples = (3 if small else 7) if settings.min_samples is None else settings.min_samples
    clusters = dbscan(rows, eps, min_samples)
    pixels = F.interpolate(values[None].float(), size=trunk.padded_size, mode="bilinear", align_corners=False)[0]
    if clusters.max() < 0:
        return (scale * pixels).softmax(dim=0) if vote else pixels

    regions = region_map(rows, clusters, trunk.grid, trunk.padded_size)
    num_regions, num_queries = int(clusters.max()) + 1, len(values)
    pixels, members = (
        trunk.padding.crop(pixels).flatten(1),
        trunk.padding.crop(regions).flatten(),
    )  # added pixels: no vote
    sizes = members.bincount(minlength=num_regions).clamp_min(1)
    if vote:
        labels = pixels.argmax(dim=0)
        for query in context.background_queries[1:]:
            labels = labels.masked_fill(labels == query, context.background_queries[0])
        votes = (members * num_queries + labels).bincount(minlength=num_regions * num_queries)
        totals = votes.view(num_regions, num_queries).T.float()
    else:
        totals = pixels.new_zeros(num_queries, num_regions).index_add_(1, members, pixels)
    return (totals / sizes)[:, regions]


@register_method(
    "cliptrase",
    settings=CliptraseSettings,
    paper="Shao et al., Explore the Potential of CLIP for Training-Free Open Vocabulary Segmentation, ECCV 2024",
    reference="CLIPtrase code 2b7de61",
    summary="q-q, k-k and v-v attention summed; on request DBSCAN regions that vote",
    cost="about 1.05 of a plain image pass; with clustering seconds more and Q x H x W scores",
)
class Cliptrase(Method):
    """CLIPtrase. Position table as in the "reference" rule; non-square images and batches work."""

    def request(self, settings: CliptraseSettings, num_blocks: int) -> TrunkRequest:
        heads = () if settings.clustering == "none" else (num_blocks - 2,)
        return TrunkRequest(heads=heads, position_rule=settings.position_rule)

    def patch_features(self, context: MethodContext, settings: CliptraseSettings) -> Tensor:
        block, hidden = context.tower.last_block, context.trunk.last_input
        query, key, value = project_heads(block, hidden, "qkv")
        scale = block.self_attn.scale
        attended = attend(query, query, value, scale)
        attended = attended + attend(key, key, value, scale) + attend(value, value, value, scale)
        hidden = feed_forward(block, add_projection(hidden, block.self_attn.out_proj, merge_heads(attended)))
        tokens = context.tower.project(hidden)
        context.scratch["image"] = tokens[:, 0]
        return tokens[:, 1:]

    def score_map(self, context: MethodContext, settings: CliptraseSettings, patch_features: Tensor) -> ScoreMap:
        """Cosines, or with clustering the scores of each pixel's region, (B, Q, H, W) at the padded image's size.

        With "vote" they are the shares of a region's pixels that the plain decision gives to each word; the queries of
        the background count as one. Images without any cluster keep their plain scores.
        """
        assert context.class_embeddings is not None  # score_map is only called with words
        words = F.normalize(context.class_embeddings.to(patch_features.dtype), dim=-1)
        values = (F.normalize(patch_features, dim=-1) @ words.T).permute(0, 3, 1, 2)  # (B, Q, h, w)
        scale = context.logit_scale if settings.logit_scale is None else settings.logit_scale
        if settings.image_weighting:
            image = F.normalize(context.scratch["image"], dim=-1) @ words.T  # (B, Q)
            values = values * (scale * image)[..., None, None]
        if settings.clustering == "none":
            return ScoreMap(values, "softmax", scale)
        vote = settings.clustering == "vote"
        rows = denoise(correlation(context.trunk.heads[context.tower.num_blocks - 2]))  # (B, N, N)
        pixels = [region_scores(context, settings, *image, scale) for image in zip(values, rows, strict=True)]
        return ScoreMap(torch.stack(pixels), "none" if vote else "softmax", 1.0 if vote else scale)
