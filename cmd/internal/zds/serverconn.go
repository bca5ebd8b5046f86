package zds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"
)

// A serverConn is one connection. run is its only goroutine but the reader's.
type serverConn struct {
	server *Server
	conn   *net.UnixConn
	proc   *process
	log    *slog.Logger
	wake   chan struct{} // One slot: something is dirty.

	// Guarded by the Server's mu.
	ready  bool                // Has had its snapshot.
	dirty  map[string]struct{} // UIDs to look at.
	told   map[string]uint64   // UIDs that the proxy knows of, with the serial; 0: keep.
	awaits map[string]struct{} // UIDs that the Standin has to let go of first.
}

func newServerConn(s *Server, conn *net.UnixConn, proc *process) *serverConn {
	return &serverConn{
		server: s, conn: conn, proc: proc,
		log:   proc.logger(s.cfg.Log),
		wake:  make(chan struct{}, 1),
		dirty: map[string]struct{}{}, told: map[string]uint64{}, awaits: map[string]struct{}{},
	}
}

func (c *serverConn) markLocked(uid string) {
	c.dirty[uid] = struct{}{}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// isAwaiting reports whether a pod of the snapshot cannot be sent yet.
func (c *serverConn) isAwaiting() bool {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	return len(c.awaits) > 0
}

// knowsLocked reports whether the proxy may still have the pod.
func (c *serverConn) knowsLocked(uid string) bool {
	_, ok := c.told[uid]
	return ok
}

// run talks to one proxy until one of both has enough.
func (c *serverConn) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.Close() })
	answers := make(chan answer)
	done := make(chan struct{})
	err := func() error {
		if err := c.hello(); err != nil {
			return err
		}
		_ = c.conn.SetReadDeadline(time.Time{})
		c.server.wg.Go(func() { c.read(answers, done) })
		c.log.Info("proxy connected")
		return c.talk(answers)
	}()
	stop()
	_ = c.conn.Close()
	close(done)
	c.server.remove(c)
	if ctx.Err() == nil {
		c.log.Warn("connection to proxy ended", "error", err)
	}
}

func (c *serverConn) hello() error {
	if err := c.conn.SetReadDeadline(time.Now().Add(exchange)); err != nil {
		return err
	}
	msg, files, err := receive(c.conn, make([]byte, maxReply))
	if err != nil {
		return fmt.Errorf("zds: waiting for hello: %w", err)
	}
	if len(files) > 0 {
		closeAll(files)
		return errors.New("zds: hello with a descriptor")
	}
	h, err := decodeHello(msg)
	if err == nil {
		c.server.greet(c.proc, h)
	}
	return err
}

// answer is what one read came to.
type answer struct {
	response
	files []*os.File // Of whoever takes the answer.
	err   error
}

// read hands over what the proxy sends, one answer at a time. An error is the
// last. It notices at once when the proxy hangs up.
func (c *serverConn) read(answers chan<- answer, done <-chan struct{}) {
	buf := make([]byte, maxReply+maxReply/2)
	for {
		var a answer
		msg, files, err := receive(c.conn, buf)
		switch {
		case err != nil:
			a.err = err
		default:
			a.files = files
			a.response, a.err = decodeResponse(msg)
			if n := a.holding.files(); a.err == nil && n != len(files) {
				a.err = fmt.Errorf("zds: answer with %d descriptors, not %d", len(files), n)
			}
		}
		if a.err != nil {
			closeAll(a.files)
			a.files = nil
		}
		select {
		case answers <- a:
		case <-done:
			closeAll(a.files)
			return
		}
		if a.err != nil {
			return
		}
	}
}

// talk sends the snapshot, then whatever changes.
func (c *serverConn) talk(answers <-chan answer) error {
	retry := time.NewTicker(c.server.retry)
	defer retry.Stop()
	snapshot := true
	for {
		j, ok := c.nextJob(snapshot)
		switch {
		case ok:
			if err := c.do(j, answers); err != nil {
				return err
			}
			continue
		case snapshot && !c.isAwaiting():
			if err := c.do(job{req: request{kind: kindSnapshotSent}}, answers); err != nil {
				return err
			}
			snapshot = false
			c.server.served(c)
			continue
		}
		select {
		case <-c.wake:
		case <-retry.C:
			c.askAgain()
		case a := <-answers:
			closeAll(a.files)
			if a.err == nil {
				a.err = errors.New("zds: a message that nothing was asked for")
			}
			return a.err
		}
	}
}

// askAgain makes the pods that this proxy refused, or that could not be sent to
// it, be sent once more.
func (c *serverConn) askAgain() {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, p := range s.pods {
		if p.noYield {
			p.noYield = false
			s.markLocked(uid)
		}
		if p.nack == "" || s.targetLocked(p) != c {
			continue
		}
		if c.knowsLocked(uid) {
			c.told[uid] = 0
		} // Else the proxy never heard of it: we were out of descriptors.
		c.markLocked(uid)
	}
}

// A job is one message to send, and what it is about.
type job struct {
	req    request
	files  Files // Ours; closed after sending.
	pod    *serverPod
	serial uint64
}

// nextJob takes dirty pods until one has something to be said.
func (c *serverConn) nextJob(snapshot bool) (job, bool) {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	for uid := range c.dirty {
		delete(c.dirty, uid)
		if j, ok := c.jobLocked(uid, snapshot); ok {
			return j, true
		}
	}
	return job{}, false
}

// jobLocked compares what the proxy was told of a pod with what it should be.
func (c *serverConn) jobLocked(uid string, snapshot bool) (job, bool) {
	p := c.server.pods[uid]
	serial, told := c.told[uid]
	delete(c.awaits, uid)
	switch {
	case p == nil && told:
		return job{req: request{kind: kindDel, workload: Workload{UID: uid}}}, true
	case p == nil:
		return job{}, false
	case told && c.ready && p.reader == c.proc && c.server.heirLocked(p) != nil:
		return p.yieldJob(uid)
	case c.proc.hello.leaving:
		// What it has it keeps as it is.
	case p.files.Device != nil && !p.stale && c.server.targetLocked(p) == c:
		if told && serial == p.serial {
			return job{}, false
		}
		if c.server.standsLocked(uid) {
			c.awaits[uid] = struct{}{} // It is marked again once the Standin has stopped.
			return job{}, false
		}
		files, err := p.filesToSend()
		if err != nil {
			p.nack = err.Error()
			if p.end != nil && p.reader == nil {
				p.dropEnd()
				p.noYield = true
				c.server.settleLocked(uid, p)
			}
			return job{}, false
		}
		// From here on the proxy may have it, whatever becomes of the message.
		p.reader = c.proc
		c.told[uid] = p.serial
		req := request{kind: kindAdd, workload: p.workload}
		if req.workload.Device != nil { // Else a stock message, which means one descriptor.
			req.icmp, req.predecessor, req.part = len(files.ICMP), files.Predecessor != nil, c.proc.hello.part
		}
		return job{req: req, files: files, pod: p, serial: p.serial}, true
	}
	if snapshot && !told {
		c.told[uid] = 0
		lend := p.files.Device == nil && c.proc.hello.ztun
		return job{req: request{kind: kindKeep, workload: Workload{UID: uid}, lend: lend}, pod: p}, true
	}
	return job{}, false
}

// do sends one message, waits for its answer and notes what it says.
func (c *serverConn) do(j job, answers <-chan answer) error {
	err := func() error {
		defer j.files.Close()
		msg, err := encodeRequest(j.req)
		if err != nil {
			return err
		}
		return send(c.conn, msg, j.files.list()[:j.req.files()], time.Now().Add(exchange))
	}()
	if err != nil {
		c.unanswered(j)
		return fmt.Errorf("zds: send %v: %w", j.req.kind, err)
	}
	timeout := time.NewTimer(exchange)
	defer timeout.Stop()
	var a answer
	select {
	case a = <-answers:
	case <-timeout.C:
		// A late answer would be taken for that to the next message.
		a.err = os.ErrDeadlineExceeded
	}
	if a.err == nil && len(a.files) > 0 && !j.req.lend {
		closeAll(a.files)
		a.err = errors.New("zds: answer with a descriptor")
	}
	if a.err != nil {
		c.unanswered(j)
		return fmt.Errorf("zds: answer to %v: %w", j.req.kind, a.err)
	}
	c.checkLent(j, &a)
	c.answered(j, a)
	return nil
}

// checkLent makes an answer with files that are not the pod's one without any.
func (c *serverConn) checkLent(j job, a *answer) {
	check := c.server.cfg.Check
	if check == nil || len(a.files) == 0 {
		return
	}
	if err := check(j.req.workload.UID, filesOf(a.files, false)); err != nil {
		c.log.Error("proxy lends what is not the pod's; nobody reads its device until this proxy ends", "uid", j.req.workload.UID, "error", err)
		closeAll(a.files)
		a.files, a.holding = nil, holding{}
	}
}

func (c *serverConn) answered(j job, a answer) {
	uid, text := j.req.workload.UID, a.text
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if text != "" {
		level := slog.LevelWarn
		if j.pod != nil && j.pod.nack == text {
			level = slog.LevelDebug // Said already; it is asked again and again.
		}
		log := c.log
		if j.pod != nil {
			log = log.With("pod", j.pod.workload.Namespace+"/"+j.pod.workload.Name)
		}
		log.Log(context.Background(), level, "proxy refused", "request", j.req.kind.String(), "uid", uid, "reason", text)
	}
	switch j.req.kind {
	case kindAdd:
		if s.pods[uid] == j.pod && j.pod.serial == j.serial && j.pod.reader == c.proc {
			j.pod.nack = text
			if text == "" {
				j.pod.acked = j.serial
			}
		}
		c.takenLocked(j, text)
	case kindYield:
		c.yieldedLocked(j, text)
	case kindKeep:
		c.lentLocked(j, a)
	case kindDel:
		delete(c.told, uid)
		c.markLocked(uid) // It may have been set again meanwhile.
	}
	s.changedLocked()
}
