"""CRA and DSI against plain formulas with loops, the clustering against a search and scikit-learn's DBSCAN."""

import math

import pytest
import torch
from torch.nn import functional as F

from arm_hf.modeling.cra_dsi import (
    CraDsiSettings,
    components,
    cra_attention,
    default_key_layer,
    density_connected,
    relation,
)
from arm_hf.modeling.dense_clip import DenseCLIP


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(batch: int, count: int, width: int = 3, seed: int = 0) -> torch.Tensor:
    """Unit vectors that gather around a few directions, (B, N, W) in float64."""
    centres = torch.randn(batch, 6, width, generator=generator(seed), dtype=torch.float64)
    which = torch.randint(0, 6, (batch, count), generator=generator(seed + 1))
    points = centres.gather(1, which[..., None].expand(-1, -1, width))
    points = points + 0.35 * torch.randn(batch, count, width, generator=generator(seed + 2), dtype=torch.float64)
    return F.normalize(points, dim=-1)


def connected_by_search(similar: list[list[bool]], min_samples: int) -> list[set[int]]:
    """Clusters by breadth-first search over core points; border points are in every cluster that they touch."""
    size = len(similar)
    core = [sum(row) >= min_samples for row in similar]
    clusters, seen = [], set()
    for start in range(size):
        if not core[start] or start in seen:
            continue
        members, waiting = set(), [start]
        while waiting:
            point = waiting.pop()
            members.add(point)
            if core[point]:
                waiting += [other for other in range(size) if similar[point][other] and other not in members]
        seen |= {point for point in members if core[point]}
        clusters.append(members)
    return clusters


class TestClustering:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.5])
    def test_components(self, density, seed):
        edges = torch.rand(3, 60, 60, generator=generator(seed)) < density
        edges = edges | edges.transpose(1, 2)
        found = components(edges)
        for graph, labels in zip(edges, found, strict=True):
            reach = graph.double() + torch.eye(60, dtype=torch.float64)
            for _ in range(6):  # paths of up to 64 edges
                reach = ((reach @ reach) > 0).double()
            assert labels.tolist() == [int(row.nonzero()[0]) for row in reach]

    def test_long_chains(self):
        order = torch.stack([torch.arange(700), torch.randperm(700, generator=generator())])
        edges = torch.zeros(2, 700, 700, dtype=torch.bool)
        for graph, chain in zip(edges, order, strict=True):
            graph[chain[:-1], chain[1:]] = graph[chain[1:], chain[:-1]] = True
        assert components(edges).sum() == 0

    @pytest.mark.parametrize("min_samples", [1, 2, 3, 5, 9])
    @pytest.mark.parametrize("bound", [0.8, 0.95, 0.995])
    def test_density_connected_by_search(self, bound, min_samples):
        points = clouds(2, 50, seed=7)
        similar = points @ points.transpose(1, 2) >= bound
        found = density_connected(similar, min_samples)
        for pairs, table in zip(found.tolist(), similar.tolist(), strict=True):
            clusters = connected_by_search(table, min_samples)
            for i in range(50):
                for j in range(50):
                    assert pairs[i][j] == any(i in cluster and j in cluster for cluster in clusters)

    @pytest.mark.parametrize("min_samples", [1, 2, 3, 5, 9])
    @pytest.mark.parametrize("bound", [0.8, 0.95, 0.995])
    def test_scikit_learn(self, bound, min_samples):
        cluster = pytest.importorskip("sklearn.cluster")
        points = clouds(3, 200, seed=3)
        similar = points @ points.transpose(1, 2) >= bound
        found = density_connected(similar, min_samples)
        for vectors, pairs in zip(points, found, strict=True):
            theirs = cluster.DBSCAN(eps=1 - bound, min_samples=min_samples, metric="cosine").fit(vectors.numpy())
            labels = torch.from_numpy(theirs.labels_)
            core = torch.zeros(200, dtype=torch.bool)
            core[torch.from_numpy(theirs.core_sample_indices_)] = True
            same = (labels[:, None] == labels) & (labels >= 0)
            assert torch.equal(pairs.diagonal(), labels >= 0)
            # A core point's pairs, but for border points of several clusters, which DBSCAN gives to the first of them.
            assert torch.equal(pairs[core][:, core], same[core][:, core])
            assert (pairs | ~same).all()
            if min_samples <= 2:  # no border points
                assert torch.equal(pairs, same)

    def test_a_border_point_belongs_to_both_sides(self):
        #  0 1 2 (core 1) - 3 - 4 5 6 (core 5): 3 is similar to the core points 1 and 5 but is none itself
        similar = torch.eye(7, dtype=torch.bool)
        for i, j in [(0, 1), (1, 2), (1, 3), (3, 5), (4, 5), (5, 6)]:
            similar[i, j] = similar[j, i] = True
        pairs = density_connected(similar[None], 4)[0]
        assert pairs[3].all()
        assert not pairs[:3, 4:].any()

    def test_three_samples_is_the_most_that_connects_all_with_a_common_third(self):
        points = clouds(4, 80, seed=11)
        similar = points @ points.transpose(1, 2) >= 0.97
        common = relation(similar, CraDsiSettings(relation="common")) & ~torch.eye(80, dtype=torch.bool)
        assert common.any()
        assert density_connected(similar, 3)[common].all()
        assert not density_connected(similar, 4)[common].all()

    def test_common_third(self):
        points = clouds(1, 30, seed=5)
        similar = (points @ points.transpose(1, 2) >= 0.97)[0]
        pairs = relation(similar[None], CraDsiSettings(relation="common"))[0]
        for i in range(30):
            for j in range(30):
                thirds = [t for t in range(30) if t not in (i, j) and similar[i, t] and similar[j, t]]
                assert pairs[i, j] == bool(thirds)

    @pytest.mark.parametrize("kind", ["reachable", "common", "none"])
    def test_order_of_patches_does_not_matter(self, kind):
        keys, values = clouds(2, 40, seed=2), torch.randn(2, 40, 8, generator=generator(), dtype=torch.float64)
        order = torch.randperm(40, generator=generator(4))
        settings = CraDsiSettings(relation=kind, eps=0.95)
        there = cra_attention(keys, values, settings)[:, order]
        torch.testing.assert_close(cra_attention(keys[:, order], values[:, order], settings), there, atol=1e-6, rtol=0)


def by_hand(clip, image: torch.Tensor, settings: CraDsiSettings) -> tuple[torch.Tensor, float]:
    """Features of one image, (N, D), and the share of related pairs, from the paper's equations, patch by patch."""
    count = len(clip.vision_model.encoder.layers)
    states = clip.vision_model(image, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    states = [state[0] if settings.use_cls else state[0, 1:] for state in states]
    blocks, last = clip.vision_model.encoder.layers, clip.vision_model.encoder.layers[-1]
    layer = settings.layer or math.ceil(9 * count / 24)
    keys = blocks[layer - 1].self_attn.k_proj(blocks[layer - 1].layer_norm1(states[layer - 1]))
    size = len(keys)

    values = last.self_attn.v_proj(last.layer_norm1(states[count - 1]))
    for i in range(count - 1, count - settings.depth, -1):  # layers counted from 1
        x = states[i - 1]
        x = x + blocks[i - 1].mlp(blocks[i - 1].layer_norm2(x) if settings.ffn_norm else x)
        values = values + last.self_attn.v_proj(last.layer_norm1(x) if settings.value_norm else x)
    if settings.combine == "mean":
        values = values / settings.depth

    cosine = [[float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm())) for j in range(size)] for i in range(size)]
    if settings.eps_is == "similarity":
        similar = [[i == j or cosine[i][j] >= settings.eps for j in range(size)] for i in range(size)]
    else:
        similar = [[i == j or 1 - cosine[i][j] <= settings.eps for j in range(size)] for i in range(size)]
    clusters = connected_by_search(similar, settings.min_samples)

    rows, related = [], 0
    for i in range(size):
        scores = []
        for j in range(size):
            if settings.relation == "reachable":
                pair = any(i in cluster and j in cluster for cluster in clusters)
            elif settings.relation == "common":
                pair = any(similar[i][t] and similar[j][t] for t in range(size) if t not in (i, j))
            else:
                pair = False
            product = cosine[i][j] if settings.normalize_keys else float(keys[i] @ keys[j])
            scores.append(settings.temperature * (product + (settings.eps if pair else 0.0)))
            related += pair
        highest = max(scores)
        weights = [math.exp(score - highest) for score in scores]
        rows.append(sum(w / sum(weights) * v for w, v in zip(weights, values, strict=True)))
    out = clip.visual_projection(clip.vision_model.post_layernorm(last.self_attn.out_proj(torch.stack(rows))))
    return (out[1:] if settings.use_cls else out), related / size**2


READINGS = {
    "defaults": {},
    "eps": {"eps": 0.65},
    "layer": {"layer": 9, "eps": 0.72},
    "last_layer": {"layer": 12, "eps": 0.75, "temperature": 8.0},
    "first_layer": {"layer": 1, "eps": 0.25},
    "distance": {"eps_is": "distance", "eps": 0.35},
    "common": {"relation": "common", "eps": 0.65},
    "no_relation": {"relation": "none"},
    "all_core": {"min_samples": 1, "eps": 0.68},
    "raw_keys": {"normalize_keys": False, "temperature": 0.01, "eps": 0.65},
    "raw_keys_no_relation": {"normalize_keys": False, "temperature": 0.01, "relation": "none"},
    "last_value": {"depth": 1, "eps": 0.65},
    "four_values": {"depth": 4, "eps": 0.65},
    "sum": {"combine": "sum", "eps": 0.65},
    "literal_equation_4": {"ffn_norm": False, "value_norm": False, "eps": 0.65},
    "cls": {"use_cls": True, "eps": 0.65},
}
WITHOUT_RELATION = {"defaults", "no_relation", "raw_keys_no_relation"}  # no keys here are as similar as 0.75


@pytest.mark.parametrize(("size", "error"), [((64, 64), 1e-11), ((48, 80), 3e-6)])  # resizing of positions: float32
@pytest.mark.parametrize("name", READINGS)
@torch.no_grad()
def test_plain_formula(tiny_clip, name, size, error):
    clip = tiny_clip.double()
    images = torch.randn(2, 3, *size, generator=generator(1), dtype=torch.float64)
    images[..., 40:] = images[..., 40:].mean(dim=(-1, -2), keepdim=True)  # some patches that are much alike
    settings = CraDsiSettings(position_rule="transformers", **READINGS[name])
    options = {"position_rule": "transformers", **READINGS[name]}
    found = DenseCLIP(clip).features(images, "cra_dsi", options).patch_features
    for image, features in zip(images, found, strict=True):
        expected, share = by_hand(clip, image[None], settings)
        torch.testing.assert_close(features.flatten(0, 1), expected, atol=error, rtol=error)
        assert share == 0 if name in WITHOUT_RELATION else 0 < share < 1, share


class TestSettings:
    def test_key_layer(self):
        assert [default_key_layer(depth) for depth in (1, 2, 12, 24, 32)] == [1, 1, 5, 9, 12]
        assert CraDsiSettings().key_block(24) == 8
        assert CraDsiSettings(layer=12).key_block(12) == 11

    @pytest.mark.parametrize("layer", [0, -1, 13])
    def test_no_such_layer(self, tiny_clip, pixels, layer):
        with pytest.raises(ValueError, match=f"layer must be 1 to 12 for this CLIP, got {layer}"):
            DenseCLIP(tiny_clip).features(pixels, "cra_dsi", {"layer": layer})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eps": 0.0}, "eps must be above 0"),
            ({"eps": 1.5}, "at most 1"),
            ({"eps_is": "angle"}, "eps_is must be one of similarity, distance"),
            ({"relation": "all"}, "relation must be one of reachable, common, none"),
            ({"combine": "max"}, "combine must be one of mean, sum"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"min_samples": 0}, "min_samples must be at least 1"),
            ({"depth": 0}, "depth must be at least 1"),
        ],
    )
    def test_wrong_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            CraDsiSettings(**options)
        assert CraDsiSettings(eps=1.5, eps_is="distance").eps == 1.5

    @torch.no_grad()
    def test_more_values_than_the_tower_has(self, tiny_clip, pixels):
        dense = DenseCLIP(tiny_clip)
        all_of_them = dense.features(pixels, "cra_dsi", {"depth": 12}).patch_features
        assert torch.equal(dense.features(pixels, "cra_dsi", {"depth": 99}).patch_features, all_of_them)
