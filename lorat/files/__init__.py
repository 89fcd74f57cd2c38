"""Files and folders of any storage, read and written whole or not at all."""
