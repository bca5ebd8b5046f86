package zds

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// A proxy of ztun that started later succeeds an earlier one, or one that is
// about to end, pod by pod and without a cut:
//
//  1. The later one has had its snapshot.
//  2. Yield, with one end of a packet socket, to the reader. Its answer says that
//     it has left the device for good; from now on it reads from the socket.
//  3. Add, with the other end, to the later one. It reads the device, and sends
//     to the socket what belongs to no connection of its own.
//
// The socket says who reads when nobody can be asked: a proxy that has yielded
// reads again once the other end is closed everywhere. So an agent that ends
// between 2 and 3, or a later proxy that refuses or ends, leaves the earlier one
// as the reader; and whoever has the other end closes it only after it has left
// the device. The Server has a duplicate until the Add is acknowledged.
//
// A later agent lacks the devices that proxies hold. It asks for them with the
// Keep of a snapshot, and is told who reads and who has yielded.

// packetBuffer is the room of the socket in bytes: a burst of super-segments.
const packetBuffer = 4 << 20

// handover is where a pod's device is on its way from proxy to proxy.
type handover struct {
	older   []*process // Have yielded it and live, the oldest first.
	end     *os.File   // The other end of the last one's socket, until it is acknowledged.
	noYield bool       // Until the next retry: it went wrong.
}

// dropEnd closes the Server's descriptor of the socket. If it was the only
// one, the last that yielded reads again.
func (h *handover) dropEnd() {
	if h.end != nil {
		_ = h.end.Close()
		h.end = nil
	}
}

// canSucceed reports whether o can be the next reader after those that have
// yielded.
func (h *handover) canSucceed(o *process) bool {
	return o.hello.ztun && !slices.Contains(h.older, o)
}

// heirLocked is the connection of the proxy that is to read p's device from now
// on, though another one does. nil: there is none.
func (s *Server) heirLocked(p *serverPod) *serverConn {
	r := p.reader
	if r == nil || !r.hello.ztun || p.files.Device == nil || p.workload.Device == nil || p.noYield || p.end != nil {
		return nil
	}
	return s.latestLocked(func(c *serverConn) bool {
		return c.ready && c.proc != r && !c.proc.hello.leaving && p.canSucceed(c.proc) &&
			(r.hello.leaving || c.proc.hello.started > r.hello.started)
	})
}

// greet notes what a proxy says of itself.
func (s *Server) greet(proc *process, h hello) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.ztun && h.part == 0 {
		h.part = s.freePartLocked(proc)
	}
	proc.hello = h
	s.lookAgainLocked()
}

// freePartLocked is a part of the ports that no other proxy dials from.
func (s *Server) freePartLocked(proc *process) int {
	if proc.hello.part > 0 {
		return proc.hello.part
	}
	for part := 1; part <= portParts; part++ {
		if !slices.ContainsFunc(s.procs, func(o *process) bool { return o != proc && o.hello.part == part }) {
			return part
		}
	}
	return len(s.procs)%portParts + 1
}

// served notes that the connection has had its snapshot: it can succeed others.
func (s *Server) served(c *serverConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.ready = true
	s.lookAgainLocked()
}

func (s *Server) lookAgainLocked() {
	for uid, p := range s.pods {
		s.settleLocked(uid, p)
		s.markLocked(uid)
	}
}

// freeLocked notes that p's reader reads no more.
func (s *Server) freeLocked(p *serverPod) {
	p.reader, p.acked, p.nack = nil, 0, ""
	p.stale = p.workload.Device != nil && len(p.workload.Device.OlderFlows) > 0
}

// settleLocked lets the last that yielded be the reader again if nobody else
// is going to be.
func (s *Server) settleLocked(uid string, p *serverPod) {
	if p.reader != nil || p.files.Device == nil {
		return
	}
	n := len(p.older)
	if n == 0 {
		p.dropEnd()
		return
	}
	if p.end != nil && s.targetLocked(p) != nil {
		return
	}
	p.dropEnd()
	p.reader, p.older = p.older[n-1], p.older[:n-1]
	p.stale = false // It knows which of the older flows are left.
	if c := s.targetLocked(p); c == nil || c.told[uid] == p.serial || p.reader.hello.leaving {
		p.acked = p.serial
	}
	s.markLocked(uid)
}

// yieldJob asks p's reader to yield.
func (p *serverPod) yieldJob(uid string) (job, bool) {
	ours, theirs, err := packetPair()
	if err != nil {
		p.nack, p.noYield = err.Error(), true
		return job{}, false
	}
	p.end = ours
	req := request{kind: kindYield, workload: Workload{UID: uid}}
	return job{req: req, files: Files{Device: theirs}, pod: p, serial: p.serial}, true
}

// packetPair returns both ends of a packet socket.
func packetPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("zds: packet socket: %w", err)
	}
	for _, fd := range fds {
		// What does not fit is lost, and sent again by TCP.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, packetBuffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, packetBuffer)
		}
	}
	return os.NewFile(uintptr(fds[0]), "predecessor"), os.NewFile(uintptr(fds[1]), "successor"), nil
}

// filesToSend are those of an Add.
func (p *serverPod) filesToSend() (Files, error) {
	files := p.files
	files.Predecessor = p.end
	return files.dup()
}

// yieldedLocked takes the answer to a Yield.
func (c *serverConn) yieldedLocked(j job, text string) {
	s, p, uid := c.server, j.pod, j.req.workload.UID
	if s.pods[uid] != p || p.reader != c.proc || p.end == nil {
		return // It changed meanwhile, which closed the socket.
	}
	if text != "" {
		p.dropEnd()
		p.noYield = true
		return
	}
	p.older = append(p.older, c.proc)
	s.freeLocked(p)
	s.settleLocked(uid, p)
	s.markLocked(uid)
}

// takenLocked takes the answer to an Add.
func (c *serverConn) takenLocked(j job, text string) {
	s, p, uid := c.server, j.pod, j.req.workload.UID
	if s.pods[uid] != p || p.reader != c.proc {
		return
	}
	if text == "" {
		if j.req.predecessor {
			p.dropEnd()
		}
		return
	}
	if len(p.older) > 0 {
		// It has closed what it was sent: the one before reads again.
		p.dropEnd()
		p.reader, p.acked, p.noYield = nil, 0, true
		c.told[uid] = 0
		s.settleLocked(uid, p)
	}
}

// unanswered cleans up after a message of which nobody knows whether it came.
func (c *serverConn) unanswered(j job) {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := j.pod; j.req.kind == kindYield && p.reader == c.proc {
		p.dropEnd() // If it did, the reader reads again.
	} // The end of an Add is sent again when its reader comes back.
}

// lentLocked takes the answer to a Keep. It owns what came with it.
func (c *serverConn) lentLocked(j job, a answer) {
	s, p, uid := c.server, j.pod, j.req.workload.UID
	h, files := a.holding, filesOf(a.files, false)
	known := s.pods[uid] == p && j.req.lend && p.files.Device == nil && p.workload.Device != nil
	switch {
	case known && h.yielded && p.reader != c.proc && !slices.Contains(p.older, c.proc):
		p.older = append(p.older, c.proc)
		slices.SortStableFunc(p.older, func(x, y *process) int {
			if x.hello.started < y.hello.started {
				return -1
			}
			return 1
		})
	case known && h.reads:
		d := *p.workload.Device
		d.ID, d.Offload = h.deviceID, h.offload
		p.workload.Device, p.files = &d, files
		// It was described to the proxy by an earlier agent: that is done again.
		p.reader, p.acked, p.stale = c.proc, 0, false
		p.older = slices.DeleteFunc(p.older, func(o *process) bool { return o == c.proc })
		c.told[uid] = 0
		if c.proc.hello.leaving { // Then it takes nothing new.
			p.acked, c.told[uid] = p.serial, p.serial
		}
		s.markLocked(uid)
		return
	}
	files.Close()
}
