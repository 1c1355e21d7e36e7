"""The published architectures behind HPSv2 and ImageReward, stated anew in plain torch with the published names.

From the papers (arXiv:2103.00020, arXiv:2201.12086, arXiv:2304.05977) and the names in the published checkpoints.
"""

import torch
from torch import nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), by the names of open_clip."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenCLIP(nn.Module):
    """CLIP as open_clip builds it."""

    def __init__(self, width=32, text_width=32, heads=16, layers=2, patch=4, image=16, vocab=54, context=16, joint=12):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = nn.Parameter(torch.randn((image // patch) ** 2 + 1, width))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = nn.Module()
        self.visual.transformer.resblocks = nn.ModuleList(PreNormBlock(width, heads, 3 * width) for _ in range(layers))
        self.visual.proj = nn.Parameter(torch.randn(width, joint))
        self.token_embedding = nn.Embedding(vocab, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context, text_width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(PreNormBlock(text_width, heads, 64) for _ in range(layers + 1))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, joint))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def cosine(self, pixels, ids):
        x = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer.resblocks:
            x = block(x)
        image = self.visual.ln_post(x[:, 0]) @ self.visual.proj
        y = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=y.dtype).triu(1)
        for block in self.transformer.resblocks:
            y = block(y, mask)
        end = self.ln_final(y)[torch.arange(len(y)), ids.argmax(-1)]  # the last token of the vocabulary ends a text
        return (normalize(image, dim=-1) * normalize(end @ self.text_projection, dim=-1)).sum(-1)


class Head(nn.Module):
    """The linear layers of the aesthetic predictor and ImageReward, with their dropout."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x).squeeze(-1)


def attention(query, key, value, heads, mask=None):
    """Attention of several heads over (N, L, width)."""
    split = [one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (query, key, value)]
    return scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)


class VisionTransformer(nn.Module):
    """BLIP's image encoder."""

    def __init__(self, width=32, heads=16, layers=2, patch=4, image=16):
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(layers))
        for block in self.blocks:
            block.norm1, block.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
            block.attn, block.mlp = nn.Module(), nn.Module()
            block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + block.attn.proj(attention(*block.attn.qkv(block.norm1(x)).chunk(3, -1), self.heads))
            x = x + block.mlp.fc2(gelu(block.mlp.fc1(block.norm2(x))))
        return self.norm(x)


class BertAttention(nn.Module):
    def __init__(self, width, seen):
        super().__init__()
        self.self, self.output = nn.Module(), nn.Module()
        self.self.query, self.self.key, self.self.value = (nn.Linear(n, width) for n in (width, seen, seen))
        self.output.dense, self.output.LayerNorm = nn.Linear(width, width), nn.LayerNorm(width, 1e-12)

    def forward(self, x, seen, heads, mask=None):
        y = attention(self.self.query(x), self.self.key(seen), self.self.value(seen), heads, mask)
        return self.output.LayerNorm(x + self.output.dense(y))


class TextEncoder(nn.Module):
    """BLIP's BERT, which attends to the image in every layer."""

    def __init__(self, width=24, seen=32, heads=12, layers=2, vocab=60, context=40):
        super().__init__()
        self.heads = heads
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(vocab, width)
        self.embeddings.position_embeddings = nn.Embedding(context, width)
        self.embeddings.LayerNorm = nn.LayerNorm(width, 1e-12)
        self.embeddings.register_buffer("position_ids", torch.arange(context)[None])
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.encoder.layer:
            layer.attention, layer.crossattention = BertAttention(width, width), BertAttention(width, seen)
            layer.intermediate, layer.output = nn.Module(), nn.Module()
            layer.intermediate.dense = nn.Linear(width, 4 * width)
            layer.output.dense, layer.output.LayerNorm = nn.Linear(4 * width, width), nn.LayerNorm(width, 1e-12)

    def forward(self, ids, mask, seen):
        positions = self.embeddings.position_ids[:, : ids.shape[1]]
        x = self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings(positions)
        x = self.embeddings.LayerNorm(x)
        for layer in self.encoder.layer:
            x = layer.attention(x, x, self.heads, mask[:, None, None].bool())
            x = layer.crossattention(x, seen, self.heads)
            x = layer.output.LayerNorm(x + layer.output.dense(gelu(layer.intermediate.dense(x))))
        return x


class PublishedImageReward(nn.Module):
    """ImageReward by the names of its checkpoint."""

    def __init__(self):
        super().__init__()
        self.blip = nn.Module()
        self.blip.visual_encoder, self.blip.text_encoder = VisionTransformer(), TextEncoder()
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(32, 8), nn.Linear(24, 8)  # in the file, and not used
        self.mlp = Head(24)

    def forward(self, pixels, ids, mask):
        read = self.blip.text_encoder(ids, mask, self.blip.visual_encoder(pixels))
        return (self.mlp(read[:, 0]) - 0.16717362830052426) / 1.0333394966054072
