"""Prompt tuning through the swarm: an ordinary torch loop, with blocks that are other people's.

peerd start --model demo &        # or a daemon that joined a network; PEERD_SOCKET says which
python examples/prompt_tuning.py [STEPS]
"""

import sys

import torch
from transformers import AutoTokenizer

from blocks.demo_training import greetings
from peerd.client.torch import RemoteModelForCausalLM

LENGTH, ROWS, RATE = 16, 16, 0.02

torch.manual_seed(0)
model = RemoteModelForCausalLM.from_pretrained("demo")
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
embed = model.get_input_embeddings()
prompt = torch.nn.Parameter(embed(torch.randint(len(tokenizer), (1, LENGTH))).detach().clone())
optimizer = torch.optim.AdamW([prompt], lr=RATE, weight_decay=0.0)


def loss_of(conversations: list) -> torch.Tensor:
    """How badly the model says what the assistants said, behind the prompt."""
    chats = [conversation["messages"] for conversation in conversations]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    asked = tokenizer.apply_chat_template([chat[:1] for chat in chats], tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for row, question in zip(labels, asked, strict=True):
        row[: len(tokenizer(question, add_special_tokens=False).input_ids)] = -100
    front = torch.ones(len(chats), LENGTH, dtype=torch.long)
    embeds = torch.cat([prompt.expand(len(chats), -1, -1), embed(batch.input_ids)], 1)
    mask = torch.cat([front, batch.attention_mask], 1)
    return model(inputs_embeds=embeds, attention_mask=mask, labels=torch.cat([-100 * front, labels], 1)).loss


def answer(front: torch.Tensor) -> str:
    """What the model says behind some rows."""
    chat = [{"role": "user", "content": "What is the opposite of small?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").input_ids
    said = model.generate(inputs_embeds=torch.cat([front, embed(ids)], 1), max_new_tokens=30, do_sample=False)
    return tokenizer.decode(said[0], skip_special_tokens=True)


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
examples = list(greetings.examples(seed=0, count=(steps + 2) * ROWS))
held_back, examples = examples[: 2 * ROWS], examples[2 * ROWS :]
with torch.no_grad():
    print(f"loss before: {loss_of(held_back):.3f}")
for step in range(steps):
    loss = loss_of(examples[step * ROWS : (step + 1) * ROWS])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}/{steps}: loss {loss:.3f}", end="\r" if sys.stdout.isatty() else "\n", flush=True)
with torch.no_grad():
    print(f"loss after: {loss_of(held_back):.3f}")
print(f"What is the opposite of small? Without the prompt: {answer(prompt.detach()[:, :0])}")
print(f"What is the opposite of small? With it: {answer(prompt.detach())}")
