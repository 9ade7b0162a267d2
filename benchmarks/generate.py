"""How much batching gains, and that constraints hold: `python -m benchmarks.generate [--answers 10000]`.

An untrained model of the demo's shape codes fictional notes, one at a time and 16 at a time, then answers under the
constraint of a CIM-10 table; answers that name a code the table does not allow are counted.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from benchmarks.machine import describe_machine, save_result
from finetune.data.tokenize import SampleEncoder, parse_conversation
from finetune.inference import token_bytes
from model.generate import generate
from model.transformer import Transformer
from utils.icd10.answers import parse_answer
from utils.icd10.catalogue import load_catalogue
from utils.icd10.codes import Cim10Table
from utils.icd10.constrain import AnswerConstraint, AnswerGrammar, Vocabulary
from utils.icd10.notes import write_notes
from utils.icd10.prompts import prompt_messages
from utils.make_demo_model import demo_model_args
