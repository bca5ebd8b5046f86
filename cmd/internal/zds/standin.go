package zds

import (
	"context"
	"os"
)

// A Standin reads the devices that no proxy reads. Its methods are called by
// one goroutine.
type Standin interface {
	// Start reads device, a duplicate that is the callee's from now on, as w
	// says. It returns at once.
	Start(uid string, w Workload, device *os.File)
	// Stop returns once the pod's device is not read any more. An unknown uid is
	// no error.
	Stop(uid string)
}

// standsLocked reports whether the Standin may be reading the pod's device.
func (s *Server) standsLocked(uid string) bool {
	_, ok := s.standing[uid]
	return ok
}

// orphanLocked reports whether p has a device that nobody reads or is about to.
func (s *Server) orphanLocked(p *serverPod) bool {
	return p != nil && p.files.Device != nil && p.reader == nil && len(p.older) == 0 && s.targetLocked(p) == nil
}

// standLocked makes stand look again.
func (s *Server) standLocked() {
	select {
	case s.standWake <- struct{}{}:
	default:
	}
}

// stand starts and stops the Standin until ctx ends; then it stops all of it.
func (s *Server) stand(ctx context.Context) {
	for {
		for _, uid := range s.relieve(ctx.Err() != nil) {
			s.cfg.Standin.Stop(uid)
			s.relieved(uid)
		}
		if ctx.Err() != nil {
			return
		}
		for _, o := range s.orphans() {
			s.cfg.Standin.Start(o.workload.UID, o.workload, o.device)
		}
		select {
		case <-ctx.Done():
		case <-s.standWake:
		}
	}
}

// relieve returns the pods whose device the Standin has to let go of: another
// is to have it, it is another one, or another description.
func (s *Server) relieve(all bool) (list []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, serial := range s.standing {
		if p := s.pods[uid]; all || !s.orphanLocked(p) || p.serial != serial {
			list = append(list, uid)
		}
	}
	return list
}

// relieved notes that the Standin has let go of the pod's device.
func (s *Server) relieved(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.standing, uid)
	s.markLocked(uid)
	s.changedLocked()
}

type orphan struct {
	workload Workload
	device   *os.File
}

// orphans notes that the Standin reads what nobody does, and returns it.
func (s *Server) orphans() (list []orphan) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, p := range s.pods {
		if !s.orphanLocked(p) || s.standsLocked(uid) {
			continue
		}
		device, err := dup(p.files.Device)
		if err != nil {
			s.cfg.Log.Error("nobody reads the pod's device", "uid", uid, "error", err)
			continue // Until the next change.
		}
		s.standing[uid] = p.serial
		list = append(list, orphan{p.workload, device})
	}
	return list
}
