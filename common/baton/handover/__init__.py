"""Both ends of a hand-over of KV between two workers, whatever their roles: pushing and receiving."""
