package hbone

// Resume takes back Drain: Connects are taken again.
func (p *Pool) Resume() { p.drain = false }

// Resume takes back Drain for the connections that come; those that were asked
// to open no more streams stay so.
func (s *Server) Resume() { s.drain = false }
