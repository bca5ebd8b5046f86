package standin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun"
)

// wakeID is the eventfd's number; devices count from 1.
const wakeID = 0

// runLocked starts what runs, the first time.
func (s *Standin) runLocked() (err error) {
	if s.closed {
		return errors.New("standin: closed")
	}
	if s.epfd >= 0 {
		return nil
	}
	if s.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("standin: epoll: %w", err)
	}
	if s.evfd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
		err = s.watchLocked(s.evfd, wakeID)
	}
	if err != nil {
		_ = unix.Close(s.epfd)
		_ = unix.Close(s.evfd)
		s.epfd, s.evfd = -1, -1
		return fmt.Errorf("standin: eventfd: %w", err)
	}
	s.done.Add(2)
	go s.read(s.epfd)
	go s.ask()
	return nil
}

func (s *Standin) watchLocked(fd int, id int32) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: id}
	if err := unix.EpollCtl(s.epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("standin: epoll: %w", err)
	}
	return nil
}

// signalLocked ends read.
func (s *Standin) signalLocked() {
	_, _ = unix.Write(s.evfd, binary.NativeEndian.AppendUint64(nil, 1))
}

// read is the thread that reads all devices, until Close.
func (s *Standin) read(epfd int) {
	defer s.done.Done()
	var events [64]unix.EpollEvent
	swept := time.Now()
	for {
		n, err := unix.EpollWait(epfd, events[:], int(sweepEvery/time.Millisecond))
		if err != nil && !errors.Is(err, unix.EINTR) {
			s.log.Error("devices that no proxy reads are not read any more", "error", err)
			return
		}
		for i := range max(n, 0) {
			if events[i].Fd == wakeID {
				return
			}
			s.turn(events[i].Fd)
		}
		if now := time.Now(); now.Sub(swept) >= sweepEvery {
			swept = now
			s.sweep(now)
		}
	}
}

// turn reads a batch from a device, if it is still ours.
func (s *Standin) turn(id int32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.devices[id]
	if d == nil || d.lost {
		return
	}
	now := time.Now()
	for range turnPackets {
		n, h, err := d.dev.Read(&s.vector)
		var bad *tun.HeaderError
		switch {
		case err == nil:
			s.packetLocked(d, h, s.buf[:n], now)
		case errors.Is(err, tun.ErrEmpty):
			return
		case errors.As(err, &bad):
			s.stats.Dropped++
		default:
			// The pod is gone, or its device is made anew: somebody will say so.
			s.log.Debug("device cannot be read", "pod", d.name, "uid", d.uid, "error", err)
			s.unwatchLocked(d)
			return
		}
	}
}

// packetLocked forwards a packet, holds it or drops it.
func (s *Standin) packetLocked(d *device, h tun.Header, b []byte, now time.Time) {
	p, ok := parsePacket(b)
	if ok {
		switch v, k := d.table.decide(&p, now); v {
		case pass:
			s.writeLocked(d, h, b)
			return
		case ask:
			if len(b) <= maxSYN && s.holdLocked(question{d, k, bytes.Clone(b), h}) {
				return
			}
		}
	}
	s.stats.Dropped++
}

// holdLocked queues a question. Where there is no room the SYN is lost, and sent again.
func (s *Standin) holdLocked(q question) bool {
	if s.closed || len(q.device.table.asked) >= maxAsked {
		return false
	}
	select {
	case s.questions <- q:
		q.device.table.asked[q.key] = struct{}{}
		return true
	default:
		return false
	}
}

// writeLocked gives a packet back to the pod's kernel, which routes it on.
func (s *Standin) writeLocked(d *device, h tun.Header, b []byte) {
	s.writer.Reset(h)
	s.writer.Append(b)
	if err := d.dev.WriteVector(&s.writer); err != nil {
		s.stats.Dropped++
		return
	}
	s.stats.Forwarded++
}

func (s *Standin) sweep(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.devices {
		d.table.sweep(now)
	}
}
