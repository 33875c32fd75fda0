"""Made from proto/baton/v1 by scripts/gen_proto.py; never edited. Inside Baton only `baton.codec` looks in here."""
