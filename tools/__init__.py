"""What is used beside a run. Those with a command are started as `python -m tools.NAME --help`.

generate     captions -> questions that a language model writes and our rules check (a command)
events       time-stamped events -> questions, and chains of thought that name segments (a command)
files        data.py's commands: convert, folder, filter, and the command line
check        data.py's command check
shortcuts    what the options of a file give away, without sound and question
behaviours   what completions do: verification, backtracking, ..., counted by words or by a judge (a command)
server       the client of an OpenAI-compatible server, and the resumable run that generate and events share
served       the questions of eval.py to a model behind such a server
sounds       the demo's sounds: synthesised, written as wav files, with questions about them
demo         the demo's tiny base models and its knobs
small_omni   a real audio language model of 160 million parameters, made from packages on a CPU (a command)
speech       voices and recordings that it learns from
spoken       spoken questions for it, whose options give nothing away (a command)
export       a trained adapter for other programs, and the Hub (a command)
card         what stands beside an adapter: base, data, command, accuracy
ask          eval.py --ask
served       eval.py --base_url
pages        report.html and rollouts.html: look through failures by ear
plots        curves.png of a run; several runs in one picture and one table (a command)
trackers     --report_to: a run's log to tensorboard, trackio, wandb, swanlab (a command)
fits         will a step fit into the memory of the card?
installed    the commands that pip install adds
"""
