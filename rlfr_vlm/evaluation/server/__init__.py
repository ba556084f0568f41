"""Chat servers: asking one, judging through one, and starting one."""
