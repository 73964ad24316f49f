"""Imported first by each package that imports transformers: its auto classes, and with these our models.

Otherwise one of our modules, half imported, would be the one whose import of transformers calls for all the others.
"""

import transformers.models.auto.modeling_auto  # noqa: F401
