# SPDX-License-Identifier: Apache-2.0
"""HiLo in the encoder of Hugging Face's RT-DETR: trains a small one on random images. In one from ``from_pretrained``, the same
replacement keeps all other weights; the new attention is then fine-tuned."""

import torch
from transformers import RTDetrConfig, RTDetrForObjectDetection
from transformers.models.rt_detr.modeling_rt_detr import RTDetrAIFILayer

from hilo import HiLo


class HiLoAIFI(RTDetrAIFILayer):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn = HiLo(config.encoder_hidden_dim, config.encoder_attention_heads, qkv_bias=True)

    def forward(self, hidden_states, **kwargs):  # (B, dim, H, W)
        H, W = hidden_states.shape[2:]
        x = hidden_states.flatten(2).mT  # (B, H * W, dim)
        pos = self.position_embedding(width=W, height=H, device=x.device, dtype=x.dtype)
        for layer in self.layers:  # DETR adds positions to queries and keys, but not to values
            x = layer.self_attn_layer_norm(x + layer.self_attn(x, H, W, pos=pos))
            x = layer.final_layer_norm(x + layer.mlp(x))
        return x.mT.unflatten(2, (H, W))


torch.manual_seed(0)
model = RTDetrForObjectDetection(RTDetrConfig(decoder_layers=2, num_queries=20, num_labels=3))
model.model.encoder.aifi = torch.nn.ModuleList(HiLoAIFI(model.config) for _ in model.model.encoder.aifi)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
images = torch.randn(2, 3, 64, 96)
labels = [dict(class_labels=torch.tensor([label]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.6]])) for label in range(2)]  # centre, size
for step in range(6):
    loss = model(images, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
