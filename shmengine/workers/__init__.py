"""Worker processes: started, watched and replaced by `pool`; what runs inside them is `child`."""
