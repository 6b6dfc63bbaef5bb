"""How codes are chosen on a format's grid; one file a method, one interface (`method.Method`)."""
