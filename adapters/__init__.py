"""Adapters to other frameworks, one module each; each needs the extra of the same name.

* ``routehead_plugins.adapters.llama_index`` needs ``routehead-plugins[llama-index]``.
* ``routehead_plugins.adapters.langchain`` needs ``routehead-plugins[langchain]``.
* ``routehead_plugins.adapters.pyserini`` needs ``routehead-plugins[pyserini]``.
"""
