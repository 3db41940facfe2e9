"""Sentences from a small grammar in four languages. Templates for evaluation are never used in training."""

from __future__ import annotations

import re

import numpy as np

Words = dict[str, tuple[str, ...]]
Templates = tuple[str, ...]

ENGLISH: Words = {
    "who": ("my neighbour", "the old captain", "our teacher", "a young painter", "the baker", "her brother",
            "the doctor", "their cousin", "the tall woman", "a curious child"),
    "did": ("opened", "painted", "carried", "found", "forgot", "cleaned", "borrowed", "washed", "measured", "chose"),
    "thing": ("the blue boat", "a heavy book", "the garden gate", "my favourite cup", "the wooden chair",
              "a paper lamp", "the little clock", "five green apples", "the oven", "an empty bottle"),
    "where": ("near the river", "in the kitchen", "behind the house", "at the market", "on the roof", "by the sea",
              "under the bridge", "in the park"),
    "when": ("yesterday", "this morning", "before lunch", "on Sunday", "last winter", "every evening", "at noon"),
    "how": ("wonderful", "strange", "easy", "far too loud", "rather quiet", "very funny", "beautiful", "quite slow"),
    "number": ("two", "seven", "thirteen", "forty", "one hundred", "ninety-nine", "eleven"),
}
GERMAN: Words = {
    "who": ("mein Nachbar", "die junge Ärztin", "unser Lehrer", "der alte Kapitän", "meine Schwester", "der Bäcker",
            "die kleine Köchin", "ein müder Wanderer"),
    "did": ("öffnete", "malte", "suchte", "fand", "vergaß", "holte", "zeigte", "reparierte"),
    "thing": ("das blaue Boot", "die schöne Uhr", "einen schweren Koffer", "das Fenster", "fünf grüne Äpfel",
              "die große Lampe", "den Schlüssel", "ein leeres Glas"),
    "where": ("am Fluss", "in der Küche", "hinter dem Haus", "auf dem Markt", "im Garten", "unter der Brücke"),
    "when": ("gestern", "heute früh", "am Sonntag", "vor dem Essen", "im letzten Winter", "jeden Abend"),
    "how": ("wunderbar", "seltsam", "ganz einfach", "viel zu laut", "sehr lustig", "ziemlich ruhig"),
    "number": ("zwei", "sieben", "dreizehn", "vierzig", "hundert", "elf"),
}
FRENCH: Words = {
    "who": ("mon voisin", "la jeune médecin", "notre ami", "le vieux marin", "ma cousine", "le boulanger"),
    "did": ("ouvre", "cherche", "trouve", "oublie", "montre", "apporte", "nettoie"),
    "thing": ("le bateau bleu", "une belle horloge", "la porte du jardin", "cinq pommes vertes", "un grand livre",
              "la petite lampe"),
    "where": ("près de la rivière", "dans la cuisine", "au marché", "derrière la maison", "sous le pont"),
    "when": ("ce matin", "le dimanche", "avant midi", "chaque soir", "en hiver"),
    "how": ("magnifique", "étrange", "très facile", "trop bruyant", "plutôt calme"),
    "number": ("deux", "sept", "treize", "quarante", "cent"),
}
SPANISH: Words = {
    "who": ("mi vecino", "la joven doctora", "nuestro amigo", "el viejo marinero", "mi hermana", "el panadero"),
    "did": ("abre", "busca", "encuentra", "olvida", "muestra", "lleva", "limpia"),
    "thing": ("el barco azul", "un reloj bonito", "la puerta del jardín", "cinco manzanas verdes", "un libro grande",
              "la lámpara pequeña"),
    "where": ("cerca del río", "en la cocina", "en el mercado", "detrás de la casa", "bajo el puente"),
    "when": ("esta mañana", "el domingo", "antes del almuerzo", "cada noche", "en invierno"),
    "how": ("maravilloso", "extraño", "muy fácil", "demasiado ruidoso", "bastante tranquilo"),
    "number": ("dos", "siete", "trece", "cuarenta", "cien"),
}
# Language: words, templates of training, templates of evaluation.
GRAMMAR: dict[str, tuple[Words, Templates, Templates]] = {
    "en": (ENGLISH, (
        "{when}, {who} {did} {thing} {where}.", "{who} {did} {thing}, and {who} {did} {thing}.",
        "I think that {thing} is {how}.", "Have you seen {thing} {where}?", "No, {who} never {did} {thing}!",
        "There are {number} people {where}, but only {number} of them {did} {thing}.", "Oh, how {how}!",
        "{who} told me {when} that {thing} is {how}.", "{number}, {number}, {number}, and {number}.",
    ), (
        "Why is {thing} {where} so {how}?", "If {who} {did} {thing}, we will all meet {where}.",
        "Please show {who} {thing}, because it looks {how}.",
    )),
    "de": (GERMAN, (
        "{who} {did} {when} {thing} {where}.", "Ich glaube, das ist {how}.", "Hast du {thing} {where} gesehen?",
        "{number} Leute warten {where}, aber nur {number} sind da.", "Nein, {who} {did} nie {thing}!",
        "{when} {did} {who} {thing}, und {who} {did} {thing}.",
    ), (
        "Warum ist es {where} immer so {how}?", "Wenn es {how} wird, treffen wir uns {when} {where}.",
    )),
    "fr": (FRENCH, (
        "{when}, {who} {did} {thing} {where}.", "Je pense que c'est {how}.", "As-tu vu {thing} {where} ?",
        "Il y a {number} personnes {where}.", "{who} {did} {thing}, et {who} {did} {thing}.",
    ), (
        "Pourquoi est-ce toujours {how} {where} ?", "Demain, {who} {did} {number} fois {thing}.",
    )),
    "es": (SPANISH, (
        "{when}, {who} {did} {thing} {where}.", "Creo que esto es {how}.", "¿Has visto {thing} {where}?",
        "Hay {number} personas {where}.", "{who} {did} {thing}, y {who} {did} {thing}.",
    ), (
        "¿Por qué es siempre tan {how} {where}?", "Mañana, {who} {did} {number} veces {thing}.",
    )),
}


def sentence(rng: np.random.Generator, language: str, held_out: bool = False) -> str:
    """A sentence in `language` (en, de, fr, es) from the templates of training, or from those of evaluation."""
    words, training, evaluation = GRAMMAR[language]
    template = str(rng.choice(evaluation if held_out else training))
    text = re.sub(r"\{(\w+)\}", lambda slot: str(rng.choice(words[slot[1]])), template)
    return text[0].upper() + text[1:]
