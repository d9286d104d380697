"""Published claims as tests: a pytest plugin that reports what each of them measured.

pytest enters by the module `metafocus_claims`, which adds options, marker and fixture. In this
package, `marker` reads the markers, `plugin` follows a run, `report` makes rows of what was
measured, `page` writes them as Markdown, and `process` runs pytest for `metafocus reproduce`.
"""
