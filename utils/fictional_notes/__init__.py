"""Fictional French discharge notes with their codes, written offline from templates or by Mistral's API.

catalogue             diagnoses and their wordings, from common_codes.toml or a CIM-10 table
scenarios             stays: patient, length, codes
distractors           diagnoses that a note mentions but that are not coded
phrases, note_writer  sentence templates, and filling them
notes                 notes from templates
api_notes             notes from Mistral's API
pretraining_examples  training data of the demo's base model
"""
