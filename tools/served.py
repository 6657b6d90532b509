"""A model behind an OpenAI-compatible server that takes sound: eval.py asks it in place of one that it loads.

The prompt is the one of training, with the clips in it as base64 WAV: 16 kHz, mono, 16 bit. Client, retries
and key are those of tools/server.py. This file needs no torch.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import replace

import soundfile

import data
import eval as ev
from data import DataError, Example
from tools import server

AT_ONCE = 16  # requests


def ask(options: ev.Options, items: list, take: Callable) -> None:
    """Ask every rotation that the items miss; take(item, rotation, answer) is called in their order.

    answer: what a line of items.jsonl says of it. The failed requests come last, so a run that is stopped
    leaves answers only. Raises UserError if no request can succeed, and KeyboardInterrupt after Ctrl-C.
    """
    send = server.Chat(options.model, None, options.base_url, options.temperature, options.new_tokens).send
    failed = []

    def work(question):
        answer = server.Answer()
        try:
            answer.row = dict(said=answers_to(send, options, *question), error="")
        except DataError as e:  # a clip that cannot be heard
            answer.row = dict(said=[], error=str(e))
        except server.FAILURES as e:
            answer.error = e
        return answer

    def take_answer(question, answer):
        if answer.error is None:
            take(*question, answer.row)
        else:
            failed.append((*question, dict(said=[], error=f"{ev.FAILED}{answer.error}")))

    questions = [(item, rotation) for item in items for rotation in item.missing]
    _, stopping = server.answer_all(questions, len(questions), "question", work, take_answer, AT_ONCE)
    if stopping:
        raise stopping[0]
    for question in failed:
        take(*question)


def answers_to(send: Callable, options: ev.Options, item, rotation: int) -> list[str]:
    """One request a sample, each with its own seed. Raises DataError, and what `send` raises."""
    messages = messages_of(ev.rotate(item.played, rotation), options)
    seeds = [data.seed_of(options.seed, item.key, rotation, k) for k in range(options.samples)]
    return [send(messages, seed >> 25)[0] for seed in seeds]  # 31 bits, as in server.ask


def messages_of(example: Example, options: ev.Options) -> list[dict]:
    """The messages of training, with what is to be heard in the places of the clips. Raises DataError."""
    plain = replace(  # what a question says is no markup: as model.encode_prompt has it
        example,
        question=example.question.replace("<|", "< |"),
        choices=[choice.replace("<|", "< |") for choice in example.choices],
    )
    with_audio = options.audio != "none"
    messages = data.chat_messages(plain, data.PROMPTS[options.prompt], with_audio)
    if with_audio:
        for place, clip in enumerate(example.clips):  # they stand in front of the text
            messages[-1]["content"][place] = sound_part(clip, options)
    return messages


def sound_part(clip, options: ev.Options) -> dict:
    """A clip, or as much silence, as a part of a message. Raises AudioError."""
    wave, _ = data.load_audio(clip, options.max_audio_s)
    if options.audio == "silence":
        wave[:] = 0
    file = io.BytesIO()
    soundfile.write(file, wave, data.RATE_HZ, format="WAV", subtype="PCM_16")
    content = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": content, "format": "wav"}}
