"""Twenty real conversations: questions, and answers as a person gives them. A real model has an opinion about each token."""

_PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is 17 + 25?", "17 + 25 = 42."),
    ("Name three colours of the rainbow.", "Red, green and violet."),
    (
        "Why is the sky blue?",
        "Air scatters short waves of light more than long ones, so blue reaches us from everywhere.",
    ),
    ("Translate 'good morning' into German.", "Guten Morgen!"),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote it, probably between 1591 and 1595."),
    ("What does a list comprehension look like in Python?", "For example: [x * x for x in range(10) if x % 2 == 0]"),
    ("What is the largest planet?", "Jupiter. It has more mass than all other planets together."),
    ("How do I boil an egg?", "Put it into boiling water for seven minutes, then into cold water."),
    ("Is a tomato a fruit?", "Botanically yes; in the kitchen it is treated as a vegetable."),
    ("What is the opposite of 'ancient'?", "'Modern'."),
    ("Give me a word that rhymes with 'light'.", "'Night' does."),
    ("When did the first people land on the Moon?", "On 20 July 1969, with Apollo 11."),
    ("What is the square root of 144?", "It is 12."),
    ("Write a haiku about rain.", "Rain taps on the roof,\nthe cat sleeps beside the stove.\nNobody goes out."),
    ("What is water made of?", "Two atoms of hydrogen and one of oxygen: H2O."),
    ("Which language is spoken in Brazil?", "Portuguese, by nearly everyone."),
    ("What is 98 - 93 + 1,000?", "98 - 93 is 5, and 5 + 1,000 is 1,005."),
    ("Thank you, that was helpful 🙂", "You're welcome! Is there anything else you'd like to know?"),
]
CONVERSATIONS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in _PAIRS
]
