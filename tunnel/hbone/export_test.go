package hbone

// Held reports whether t holds buffers.
func Held(t *TLS) (in, out bool) { return t.mem.in != nil, t.mem.out != nil }
