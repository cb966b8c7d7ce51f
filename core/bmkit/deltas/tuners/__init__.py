"""bmkit's own delta methods, as tuners of PEFT; `bmkit.deltas.own` makes them known to it."""
