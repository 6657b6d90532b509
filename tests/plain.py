"""One GRPO step as a textbook writes it: what omni_grpo.py computes, without what makes it fast.

Every prompt stands there G times, rows are padded to one length, masks say what counts, and the model is the
library's own. Read this page first. The tests hold omni_grpo.py to it: the same tokens and the same rewards
give the same loss and the same gradients, to 1e-5.

A prompt and a completion are anything with `ids` (a list of token ids) and `audio` (a list of (start,
embeddings (n, H)) that replace the embeddings of some of the ids). Of a completion, `sampled` says which ids
are trained.
"""

import torch
import torch.nn.functional as F


def grpo_step(model, reference, optimizer, prompts, reward, stop_ids, **knobs):
    """Sample G completions of every prompt, reward them, and take one step of the optimizer.

    reward(prompt number, ids) -> float. knobs: those of `grpo_loss`, with group_size and max_tokens.
    """
    group_size, max_tokens = knobs.pop("group_size"), knobs["max_tokens"]
    temperature = knobs.get("temperature", 1.0)
    rows = []
    for prompt in prompts:
        for _ in range(group_size):
            rows.append((prompt, sample(model, prompt, stop_ids, max_tokens, temperature)))
    rewards = torch.tensor(
        [reward(i // group_size, completion.ids) for i, (_, completion) in enumerate(rows)]
    )
    loss = grpo_loss(model, reference, rows, rewards.view(-1, group_size), **knobs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class Sampled:
    def __init__(self, ids):
        self.ids, self.audio, self.sampled = ids, [], [True] * len(ids)


@torch.no_grad()
def sample(model, prompt, stop_ids, max_tokens, temperature):
    """One completion, token by token; the whole row goes through the model again for each of them."""
    completion = Sampled([])
    while len(completion.ids) < max_tokens:
        x, mask, _, _ = pad(model, [(prompt, completion)])
        logits = model(inputs_embeds=x, attention_mask=mask).logits[0, -1].float()
        probabilities = F.softmax(logits / temperature, dim=-1)  # the full softmax: no top-p, no top-k
        completion = Sampled(completion.ids + [torch.multinomial(probabilities, 1).item()])
        if completion.ids[-1] in stop_ids:  # it stays: ending the turn is learned, too
            break
    return completion


def grpo_loss(
    model,
    reference,
    rows,
    rewards,
    temperature=1.0,
    clip_low=0.2,
    clip_high=0.2,
    beta=0.04,
    reduce="sequence",
    max_tokens=32,
    scale="std",
    old_logps=None,
):
    """rows: R = P * G pairs (prompt, completion), the G of a prompt together. rewards (P, G).       ->
    scalar"""
    adv = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "std":
        adv = adv / (rewards.std(dim=1, keepdim=True, unbiased=False) + 1e-4)
    adv = adv.reshape(-1, 1)  # (R, 1)

    logps, trained = token_logps(model, rows, temperature)  # (R, L), (R, L)
    old_logps = logps.detach() if old_logps is None else old_logps  # the policy that sampled
    ratio = torch.exp(logps - old_logps)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * adv, clipped * adv)
    if beta:
        with torch.no_grad():
            ref_logps, _ = token_logps(reference, rows, temperature)
        d = ref_logps - logps
        objective = objective - beta * (torch.exp(d) - 1 - d)

    objective = objective * trained
    if reduce == "sequence":  # the mean over rows of the mean over their tokens (GRPO)
        lengths = trained.sum(dim=1).clamp(min=1)
        return -(objective.sum(dim=1) / lengths).mean()
    if reduce == "token":  # the mean over all tokens (DAPO)
        return -objective.sum() / trained.sum()
    return -objective.sum() / (len(rows) * max_tokens)  # a constant length (Dr. GRPO)


def token_logps(model, rows, temperature):
    """Log-probability of every token after the first, given those before it.       -> (R, L - 1), trained (R,
    L - 1)"""
    x, mask, ids, trained = pad(model, rows)
    logits = (
        model(inputs_embeds=x, attention_mask=mask).logits[:, :-1].float()
    )  # position t predicts token t + 1
    logps = F.log_softmax(logits / temperature, dim=-1)
    return logps.gather(2, ids[:, 1:, None])[:, :, 0], trained[:, 1:]


def pad(model, rows):
    """-> embeddings (R, L, H), attention mask (R, L), ids (R, L), trained (R, L); padding stands on the
    right"""
    longest = max(len(prompt.ids) + len(completion.ids) for prompt, completion in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, trained = torch.zeros_like(ids), torch.zeros(len(rows), longest)
    for r, (prompt, completion) in enumerate(rows):
        n, size = len(prompt.ids), len(prompt.ids) + len(completion.ids)
        ids[r, :size] = torch.tensor(prompt.ids + completion.ids)
        mask[r, :size] = 1
        trained[r, n:size] = torch.tensor(completion.sampled, dtype=torch.float)
    x = model.get_input_embeddings().weight[ids].clone()
    for r, (prompt, completion) in enumerate(rows):
        for offset, part in ((0, prompt), (len(prompt.ids), completion)):
            for start, audio in part.audio:
                x[r, offset + start : offset + start + len(audio)] = audio
    return x, mask, ids, trained
