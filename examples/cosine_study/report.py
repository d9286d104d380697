"""The page."""


def write_report(o, p):
    return ""
