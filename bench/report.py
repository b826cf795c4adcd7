def render(rows, facts, more): return ""
