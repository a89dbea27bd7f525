"""The only importer of llama_cpp: model, vocabulary, context, batch, sampler and adapters, thin and typed.

Nothing here is thread-safe: one thread owns a model's objects. `Vocab` alone may be read from any thread, because
llama.cpp never changes a vocabulary after loading.
"""
