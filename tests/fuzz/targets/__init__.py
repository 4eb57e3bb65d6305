"""One file for each format.

``prepare(folder)`` makes sound inputs, once. ``make(rng, folder)`` writes an odd one and says in a word how it is to
be read. ``run(folder, how)`` reads it, as a person does. ``NAMED``: ways of reading in which an error has to name a
file of the folder. ``ALLOWED``: events that are no fault here, such as connections to a host of its own."""
