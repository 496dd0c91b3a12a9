"""An OpenAI-compatible server: `transformers serve` with one model in it.

The endpoints, their formats and the one thread that generates are transformers' (`transformers.cli.serving`), used
unpatched through the classes that it builds its own server from. What is added here: requests are checked before they
reach it (`requests`), an answer ends where the release ends it and when its client leaves (`generation`), and the
server holds one model, which nobody can exchange over the network (`app`).

Needs `pip install 'hymba[serve]'`.
"""
