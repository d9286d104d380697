"""Published claims as tests: run a suite of them and report what was measured."""
