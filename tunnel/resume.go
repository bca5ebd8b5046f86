package tunnel

// Resume takes back Drain, but for what peers have been told: SYNs are answered
// again. Who waits in Drain goes on waiting. It may be called from anywhere.
func (p *Pod) Resume() {
	p.loop.Post(func() {
		if !p.draining || p.closed {
			return
		}
		p.draining = false
		p.pool.Resume()
		p.peers.Resume()
		p.publish()
	})
}
