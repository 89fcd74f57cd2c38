"""How far the platform goes: what does not depend on pixels, measured on this machine."""
