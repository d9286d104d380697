"""What the prompt of each task says before its examples."""

RULES = {
    "qa1": "The text tells where people go. Say where the person is now, the last place they went "
    "to. Answer with one sentence of the form: NAME is in the ROOM.",
    "qa2": "The text tells where people go and what they carry. Say in which room the thing is "
    "now. Answer with one sentence of the form: The THING is in the ROOM.",
    "qa3": "The text tells where people go and what they carry. Say in which room the thing was "
    "just before it came to the room asked about. Answer with one sentence of the form: Before "
    "the ROOM the THING was in the ROOM.",
    "qa4": "The text tells how rooms lie beside each other. Answer with the name of one room only.",
    "qa5": "The text tells who gives what to whom. Answer with one word, the name of a person or "
    "of a thing; if it happened more than once, the last time counts.",
    "qa6": "The text tells where people go and what they carry. The last place of a person counts. "
    "Answer with one word: yes or no.",
    "qa7": "The text tells what people take, drop and give. Answer with one word, the number of "
    "things that the person carries now: none, one, two or three.",
    "qa8": "The text tells what people take and drop. Answer only with what the person carries "
    "now: nothing, one thing, or several things in the order of taking, with commas between them.",
    "qa9": "The text tells where people are and where they are not. The last sentence about a "
    "person counts. Answer with one word: yes or no.",
    "qa10": "The text tells where people are, and sometimes only two possible places. The last "
    "sentence about a person counts. Answer with one word: yes, no or maybe.",
    "qa11": "The text tells where people go. A pronoun means the person of the sentence before it. "
    "Answer with one word, the room where the person is now.",
    "qa12": "The text tells where people go, two at a time. Answer with one word, the room where "
    "the person is now.",
    "qa13": "The text tells where people go, two at a time. 'They' means the two people of the "
    "sentence before it. Answer with one word, the room where the person is now.",
    "qa14": "The text tells when people went to which place, not in the order of time. Answer with "
    "one word, the place where the person was just before.",
    "qa15": "The text tells which animals are afraid of which, and the kinds of some animals. "
    "Answer with one word, a kind of animal.",
    "qa16": "The text tells the kinds and colors of some animals. Animals of one kind have the "
    "same color. Answer with one word, a color.",
    "qa17": "The text tells how shapes stand to each other. Answer with one word: yes or no.",
    "qa18": "The text tells which things are bigger than others. Answer with one word: yes or no.",
    "qa19": "The text tells how rooms lie beside each other. Answer with two letters of n, s, e "
    "and w, with a comma between them: the directions of the two steps.",
    "qa20": "The text tells how people feel, where they go and what they take. Answer with one "
    "word: the room that the person will go to, or how the person feels.",
}
